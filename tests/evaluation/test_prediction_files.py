from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.classes import CITYSCAPES_CLASSES, ClassInfo, label_set
from dist_pca.errors import UserError
from dist_pca.evaluation.prediction_files import Coding, prediction_folder, prediction_names, prediction_values
from dist_pca.shards.manifest import Manifest

OFFICIAL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
TREE = ClassInfo("tree", (1, 2, 3))


def shards(recipe: str, classes: tuple[ClassInfo, ...] = CITYSCAPES_CLASSES) -> Manifest:
    return Manifest(Path("shards"), recipe, 1, "test", False, classes, ())


def test_all_nineteen_classes_get_the_label_ids_of_cityscapes() -> None:
    values = prediction_values(CITYSCAPES_CLASSES, "label-ids")
    assert values.table[:19].tolist() == OFFICIAL_IDS
    assert values.description == "Cityscapes ids"


def test_label_ids_go_by_name_and_not_by_place() -> None:
    assert prediction_values(label_set("synthia_13"), "label-ids").table[:4].tolist() == [7, 8, 11, 19]


def test_label_ids_are_refused_for_a_class_that_has_none_with_the_nearest() -> None:
    classes = (*CITYSCAPES_CLASSES[:2], ClassInfo("traffic_light", (0, 0, 0)))
    with pytest.raises(UserError, match=r"--coding label-ids: 'traffic_light' is not .* nearest is 'traffic light'"):
        prediction_values(classes, "label-ids")


@pytest.mark.parametrize("recipe", ["acdc", "dark_zurich"])
def test_train_ids_are_those_of_the_data_set_and_not_of_the_run(recipe: str) -> None:
    classes = label_set("synthia_13")
    for coding in ("train-ids", None):
        values = prediction_values(classes, coding, shards(recipe))
        assert values.table[:13].tolist() == [0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18]
        assert values.description == "train ids of the shards"


@pytest.mark.parametrize("recipe", ["cityscapes", "kitti", "folder", "index", "mine", ""])
def test_other_data_sets_of_the_cityscapes_classes_get_label_ids_unless_told_otherwise(recipe: str) -> None:
    assert prediction_values(CITYSCAPES_CLASSES, None, shards(recipe)).table[:19].tolist() == OFFICIAL_IDS
    assert prediction_values(CITYSCAPES_CLASSES, "train-ids", shards(recipe)).table[:19].tolist() == list(range(19))


def test_a_class_that_is_not_of_cityscapes_gives_train_ids_and_a_line_that_says_why() -> None:
    classes = (*CITYSCAPES_CLASSES[:2], TREE)
    values = prediction_values(classes, None, shards("mine", (TREE,)))
    assert values.table[:3].tolist() == [0, 1, 2]
    assert values.description == "train ids of the run, as not all classes are in Cityscapes"


def test_colours_are_those_of_the_class_table() -> None:
    assert prediction_values((CITYSCAPES_CLASSES[0], TREE), "colors").table[:3].tolist() == [
        [128, 64, 128],
        [1, 2, 3],
        [0, 0, 0],
    ]


def test_a_folder_holds_the_values_under_the_sources_names(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [1, 0]], np.uint8)
    codings: list[tuple[Coding, str]] = [("label-ids", "L"), ("colors", "RGB")]
    for coding, mode in codings:
        values = prediction_values(CITYSCAPES_CLASSES, coding)
        with prediction_folder(tmp_path / coding, values) as save:
            save("a/key", "rgb_anon/fog/test/GOPR1/GOPR1_frame_1_rgb_anon.png", ids)
            save("other", "", ids)
        files = sorted(path.relative_to(tmp_path / coding).as_posix() for path in (tmp_path / coding).rglob("*"))
        assert files == ["GOPR1_frame_1_rgb_anon.png", "other.png"]
        image = Image.open(tmp_path / coding / files[0])
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), values.table[ids])


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ({"k": "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"}, ["berlin_000000_000019_leftImg8bit"]),
        ({"leftImg8bit_val_ulm_ulm_000000_000294_leftImg8bit": ""}, ["ulm_000000_000294_leftImg8bit"]),
        ({"k": "a/1.2.png", "other": ""}, ["1.2", "other"]),
        ({"k": "a/1.png", "l": "b/1.png"}, ["a/1", "b/1"]),
        ({"k": "a/x.png", "l": "b/X.png"}, ["a/x", "b/X"]),
        ({"k": "a/1.png", "l": "a/1.jpg"}, ["k", "l"]),
        ({"a_ulm_000000_000001_leftImg8bit": "", "b_ulm_000000_000001_leftImg8bit": ""}, None),
    ],
)
def test_files_are_called_as_their_sources_and_never_collide(sources: dict[str, str], names: list[str] | None) -> None:
    assert list(prediction_names(sources).values()) == (list(sources) if names is None else names)


@pytest.mark.parametrize(
    "source", ["../x.png", "a/../../x.png", "/etc/x.png", "a/\n.png", ".png", "", "a/.x.png", "x" * 300, "..", "a\0b"]
)
def test_a_source_that_is_no_path_inside_a_folder_is_not_used(source: str) -> None:
    assert prediction_names({"key": source}) == {"key": "key"}
