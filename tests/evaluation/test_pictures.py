import numpy as np
import pytest
from PIL import Image

from dist_pca.classes import CITYSCAPES_CLASSES, ClassInfo
from dist_pca.evaluation.pictures import color_labels, comparison_picture

CLASSES = (ClassInfo("road", (128, 64, 128)), ClassInfo("sky", (70, 130, 180)))


def image(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), (10, 200, 30), np.uint8)


def label(height: int, width: int, train_id: int) -> np.ndarray:
    return np.full((height, width), train_id, np.uint8)


def area(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == color).all(-1).sum())


def test_labels_get_their_classes_colours_and_all_else_is_black() -> None:
    colored = color_labels(np.array([[0, 1], [2, 255]], np.uint8), CLASSES)
    assert colored.tolist() == [[[128, 64, 128], [70, 130, 180]], [[0, 0, 0], [0, 0, 0]]]


def test_columns_are_input_truth_and_each_prediction() -> None:
    row = (image(60, 80), label(60, 80, 0), [label(60, 80, 0), label(60, 80, 1)])
    picture = comparison_picture([row], CLASSES, ["before", "after"])
    middles = [picture.getpixel((8 + 488 * column + 240, 200)) for column in range(4)]
    assert middles == [(10, 200, 30), (128, 64, 128), (128, 64, 128), (70, 130, 180)]


def test_without_any_truth_there_is_no_column_for_it() -> None:
    rows = [(image(60, 80), None, [label(60, 80, 1)])]
    with_truth = [(image(60, 80), label(60, 80, 1), [label(60, 80, 1)])]
    assert comparison_picture(rows, CLASSES, ["a"]).width < comparison_picture(with_truth, CLASSES, ["a"]).width


def test_a_row_without_truth_leaves_its_cell_white() -> None:
    rows = [
        (image(60, 80), label(60, 80, 0), [label(60, 80, 1)]),
        (image(60, 80), None, [label(60, 80, 1)]),
    ]
    picture = comparison_picture(rows, CLASSES, ["a"])
    assert picture.getpixel((8 + 488 + 240, 600)) == (255, 255, 255)
    assert picture.getpixel((8 + 2 * 488 + 240, 600)) == (70, 130, 180)


def test_images_of_any_size_fill_cells_of_one_width_in_their_own_aspect_ratio() -> None:
    rows = [(image(20, 40), None, [label(20, 40, 1)]), (image(900, 600), None, [label(450, 300, 1)])]
    picture = comparison_picture(rows, CLASSES, ["a"])
    assert area(picture, (10, 200, 30)) == 480 * 240 + 480 * 720


def test_an_image_of_one_row_has_a_row_in_the_picture() -> None:
    picture = comparison_picture([(image(1, 2000), None, [label(1, 2000, 1)])], CLASSES, ["a"])
    assert area(picture, (10, 200, 30)) == 480


@pytest.mark.parametrize("classes", [CLASSES, CITYSCAPES_CLASSES])
def test_the_legend_shows_every_class(classes: tuple[ClassInfo, ...]) -> None:
    row = (image(60, 80), None, [label(60, 80, 255)])
    picture = comparison_picture([row], classes, ["a"])
    assert all(area(picture, info.color) >= 15 * 15 for info in classes)


def test_a_row_with_another_number_of_predictions_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        comparison_picture([(image(6, 8), None, [])], CLASSES, ["a"])
