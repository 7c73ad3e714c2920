from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_pca.classes import CITYSCAPES_CLASSES, LABEL_SETS, ClassInfo
from dist_pca.data.class_table import class_table, describe_missing, lookup_table, missing_classes
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from tests.support.shards import data_config

SOURCE = Manifest(Path("simulator"), "r", 1, "all", True, CITYSCAPES_CLASSES, ())


def domain(*names: str, labelled: bool = True) -> Manifest:
    return Manifest(Path("camera"), "r", 1, "all", labelled, tuple(ClassInfo(name, (0, 0, 0)) for name in names), ())


def test_equal_tables_are_taken_as_they_are() -> None:
    assert class_table(data_config(), [SOURCE], [domain(*LABEL_SETS["cityscapes_19"])]) == CITYSCAPES_CLASSES
    assert class_table(data_config(), [SOURCE], []) == CITYSCAPES_CLASSES


def test_an_unlabelled_target_has_no_say() -> None:
    assert class_table(data_config(), [SOURCE], [domain("cat", labelled=False)]) == CITYSCAPES_CLASSES


@pytest.mark.parametrize(
    ("target", "difference"),
    [
        (("road", "pavement"), "train id 1: sidewalk in simulator, pavement in camera"),
        (("road",), "train id 1: sidewalk in simulator, none in camera"),
        ((*LABEL_SETS["cityscapes_19"], "boat"), "train id 19: none in simulator, boat in camera"),
    ],
)
def test_different_tables_are_refused_with_their_first_difference(target: tuple[str, ...], difference: str) -> None:
    with pytest.raises(UserError, match=rf"{difference}; set data\.classes to a common subset"):
        class_table(data_config(), [SOURCE], [domain(*target)])


@pytest.mark.parametrize("choice", ["synthia_13", LABEL_SETS["synthia_13"]])
def test_a_common_subset_is_taken_from_different_tables(choice: str | tuple[str, ...]) -> None:
    table = class_table(data_config(classes=choice), [SOURCE], [domain(*reversed(LABEL_SETS["synthia_16"]))])
    assert tuple(info.name for info in table) == LABEL_SETS["synthia_13"]
    assert set(table) < set(CITYSCAPES_CLASSES)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("synthia_12", "no label set 'synthia_12'; did you mean 'synthia_1[36]'"),
        (("road", "rod"), "'rod' is not a class of simulator; did you mean 'road'"),
        (("road", "sky", "road"), "'road' occurs twice"),
        ((), "the list is empty"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(choice: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.classes: {message}"):
        class_table(data_config(classes=choice), [SOURCE], [])


def test_a_class_that_only_one_domain_has_is_refused() -> None:
    with pytest.raises(UserError, match="'terrain' is not a class of camera"):
        class_table(data_config(classes="cityscapes_19"), [SOURCE], [domain(*LABEL_SETS["synthia_16"])])


def test_a_source_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.source: simulator has no labels"):
        class_table(data_config(), [replace(SOURCE, labelled=False)], [])


def test_labels_are_looked_up_by_name() -> None:
    table = lookup_table(domain("sky", "boat", "road"), [ClassInfo("road", (1, 1, 1)), ClassInfo("sky", (2, 2, 2))])
    assert (table.shape, table.dtype) == ((256,), np.uint8)
    assert table[[0, 1, 2]].tolist() == [1, 255, 0]
    assert set(table[3:].tolist()) == {255}


def test_shards_without_any_of_the_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^shards camera: none of the classes road, only cat, dog"):
        lookup_table(domain("cat", "dog"), [ClassInfo("road", (0, 0, 0))])


@pytest.mark.parametrize("name", ["traffic_light", "Traffic Light", "traffic-light", "trafficlight", "traffic lights"])
def test_a_missing_class_is_named_with_the_class_that_is_spelled_alike(name: str) -> None:
    shards = domain("road", "traffic sign", name)
    missing = missing_classes(shards, [*CITYSCAPES_CLASSES[:1], *CITYSCAPES_CLASSES[6:8]])
    assert missing == {"traffic light": name}
    said, left_out = describe_missing(shards, missing)
    assert said.startswith(f"shards camera: no class 'traffic light'; the nearest is {name!r}")
    assert f"--class-map '{name}=traffic light'" in said
    assert left_out == "shards camera: without traffic light, which the means therefore leave out"


def test_a_class_that_is_matched_is_suggested_for_no_other() -> None:
    # "train" is spelled much like "terrain", but it is itself a class of the run.
    assert missing_classes(domain("train", "road"), CITYSCAPES_CLASSES)["terrain"] is None
    assert missing_classes(domain("train"), [CITYSCAPES_CLASSES[9]]) == {"terrain": "train"}


def test_nothing_is_missing_from_equal_tables() -> None:
    assert missing_classes(SOURCE, CITYSCAPES_CLASSES) == {}
    assert describe_missing(SOURCE, {}) == []


def test_a_map_takes_the_place_of_names() -> None:
    shards = domain("Road", "truck", "sky")
    run = [ClassInfo(name, (0, 0, 0)) for name in ("road", "vehicle")]
    class_map = {"Road": "road", "truck": "vehicle", "sky": "vehicle"}
    assert lookup_table(shards, run, class_map)[:4].tolist() == [0, 1, 1, 255]
    assert missing_classes(shards, run, class_map) == {}


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            {"roads": "road"},
            r"class_map 'roads=road': 'roads' is not a class of the shards camera; did you mean 'road'",
        ),
        ({"road": "rod"}, r"class_map 'road=rod': 'rod' is not a class of the run; did you mean 'road'\?; its classes"),
    ],
)
def test_a_map_of_names_that_do_not_exist_is_refused(class_map: dict[str, str], message: str) -> None:
    for check in (lookup_table, missing_classes):
        with pytest.raises(UserError, match=message):
            check(domain("road", "sky"), CITYSCAPES_CLASSES, class_map)
