import numpy as np
import pytest
from PIL import Image

from dist_pca.classes import CITYSCAPES_CLASSES, ClassInfo
from dist_pca.evaluation.pictures import color_labels, grid_picture

CLASSES = (ClassInfo("road", (128, 64, 128)), ClassInfo("sky", (70, 130, 180)))


SKY = (70, 130, 180)


def image(height: int, width: int, color: tuple[int, int, int] = (10, 200, 30)) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def area(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == color).all(-1).sum())


def test_labels_get_their_classes_colours_and_all_else_is_black() -> None:
    colored = color_labels(np.array([[0, 1], [2, 255]], np.uint8), CLASSES)
    assert colored.tolist() == [[[128, 64, 128], [70, 130, 180]], [[0, 0, 0], [0, 0, 0]]]


def test_images_of_any_size_fill_cells_of_one_width_in_their_own_aspect_ratio() -> None:
    rows = [[image(20, 40), image(20, 40, SKY)], [image(900, 600), image(450, 300, SKY)]]
    picture = grid_picture(rows, ["input", "a"], CLASSES)
    assert area(picture, (10, 200, 30)) == 480 * 240 + 480 * 720


def test_an_image_of_one_row_has_a_row_in_the_picture() -> None:
    picture = grid_picture([[image(1, 2000), image(1, 2000, SKY)]], ["input", "a"], CLASSES)
    assert area(picture, (10, 200, 30)) == 480


@pytest.mark.parametrize("classes", [CLASSES, CITYSCAPES_CLASSES])
def test_the_legend_shows_every_class(classes: tuple[ClassInfo, ...]) -> None:
    picture = grid_picture([[image(60, 80), image(60, 80, (0, 0, 0))]], ["input", "a"], classes)
    assert all(area(picture, info.color) >= 15 * 15 for info in classes)
