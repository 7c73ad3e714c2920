import io
import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_pca.classes import CITYSCAPES_CLASSES, LABEL_SETS, ClassInfo, label_set
from dist_pca.console import plain_console
from dist_pca.errors import UserError
from dist_pca.evaluation.report import Scores, score, table
from tests.support.nasty import NASTY, replaced

CLASSES = (ClassInfo("road", (1, 2, 3)), ClassInfo("sky", (4, 5, 6)), ClassInfo("car", (7, 8, 9)))
COUNTS = torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
LIKE_MARKUP = ("marking [/dashed]", "[red]", "data/val[a]", "[bold", "\\\\[x]", ":car:")


def text(content: Table) -> list[list[str]]:
    """Cells of each line of a table, styled cells between asterisks."""
    console = Console(file=io.StringIO(), width=200)
    cells = [
        [f"*{cell}*" if isinstance(cell, Text) and cell.style == "bold" else str(cell) for cell in column.cells]
        for column in content.columns
    ]
    assert console.measure(content).minimum > 0
    return [list(line) for line in zip(*cells, strict=True)]


def test_scores_follow_from_the_confusion_counts() -> None:
    scores = score(COUNTS, CLASSES, 7)
    assert scores.classes == ("road", "sky", "car")
    assert scores.iou[:2] == pytest.approx((8 / 10, 10 / 12))
    assert math.isnan(scores.iou[2])
    assert scores.mean_iou == pytest.approx((8 / 10 + 10 / 12) / 2)
    assert scores.pixel_accuracy == pytest.approx(18 / 20)
    assert scores.images == 7
    assert scores.label_sets == {}


def test_a_label_sets_score_is_the_mean_of_its_classes_iou_in_the_whole_table() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 100, (19, 19), generator=generator)
    scores = score(counts, CITYSCAPES_CLASSES, 1, ["synthia_16", "synthia_13"])
    by_class = dict(zip(scores.classes, scores.iou, strict=True))
    for name in ("synthia_16", "synthia_13"):
        members = LABEL_SETS[name]
        assert scores.label_sets[name] == pytest.approx(sum(by_class[member] for member in members) / len(members))


def test_an_unknown_label_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"^evaluation\.label_sets: no label set 'synthia16'; the nearest is synthia_16"
    ):
        score(COUNTS, CLASSES, 1, ["synthia16"])


def test_a_label_set_with_classes_that_the_run_lacks_is_refused_naming_them() -> None:
    counts = torch.zeros(16, 16, dtype=torch.int64)
    with pytest.raises(
        UserError, match=r"cityscapes_19 needs terrain, truck, train, which are not classes of this run"
    ):
        score(counts, label_set("synthia_16"), 1, ["cityscapes_19"])


def test_json_is_strict_and_reads_back_to_the_same_scores() -> None:
    scores = replace(score(COUNTS, CLASSES, 7), label_sets={"synthia_13": math.nan, "synthia_16": 0.5})
    content = scores.to_json()
    strict = json.loads(content, parse_constant=pytest.fail)
    assert strict["iou"][2] is None
    back = Scores.from_json(content)
    assert repr(back) == repr(scores)


def test_one_networks_table_lists_classes_means_and_images_in_per_cent() -> None:
    scores = replace(score(COUNTS, CLASSES, 7), label_sets={"synthia_16": 0.5})
    content = table(scores)
    assert [column.header for column in content.columns] == ["class", "IoU", "precision", "recall", "F1"]
    assert text(content) == [
        ["road", "80.0", "100.0", "80.0", "88.9"],
        ["sky", "83.3", "83.3", "100.0", "90.9"],
        ["car", "-", "-", "-", "-"],
        ["mean", "81.7", "91.7", "90.0", "89.9"],
        ["mean of synthia_16", "50.0", "", "", ""],
        ["pixel accuracy", "90.0", "", "", ""],
        ["images", "7", "", "", ""],
    ]


def test_boundary_iou_is_a_column_where_it_was_asked_for() -> None:
    scores = score(COUNTS, CLASSES, 7, boundary=torch.tensor([[4, 2, 0], [4, 4, 0], [2, 2, 0]]))
    assert scores.boundary_iou[:2] == pytest.approx((2 / 6, 2 / 4))
    assert scores.mean_boundary_iou == pytest.approx((2 / 6 + 2 / 4) / 2)
    assert [line[-1] for line in text(table(scores))][:4] == ["33.3", "50.0", "-", "41.7"]


def test_classes_that_the_shards_lack_have_no_scores_and_are_in_no_mean() -> None:
    # Sky is predicted, so without shards that have it its IoU would be 0.
    counts = torch.tensor([[8, 2, 0], [0, 0, 0], [0, 5, 5]])
    scores = score(counts, CLASSES, 7, missing={"sky"})
    assert scores.missing_classes == ("sky",)
    assert scores.mean_iou == pytest.approx((8 / 10 + 5 / 10) / 2)
    assert scores.mean_precision == pytest.approx(1)
    assert [math.isnan(values[1]) for values in (scores.iou, scores.precision, scores.recall, scores.f1)] == [True] * 4
    assert scores.pixel_accuracy == pytest.approx(13 / 20)


@pytest.mark.parametrize("name", LIKE_MARKUP)
def test_names_that_look_like_markup_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    scores = score(COUNTS, (ClassInfo(name, (0, 0, 0)), *CLASSES[1:]), 7)
    plain_console().print(table(scores, name))
    assert capsys.readouterr().out.count(name) == 2


def test_scores_that_an_older_version_wrote_are_read() -> None:
    scores = score(COUNTS, CLASSES, 7)
    kept = ("classes", "iou", "mean_iou", "pixel_accuracy", "images", "label_sets")
    old = {name: value for name, value in json.loads(scores.to_json()).items() if name in kept}
    read = Scores.from_json(json.dumps(old))
    assert repr(read.iou) == repr(scores.iou)
    assert read.precision == ()
    assert math.isnan(read.mean_f1)


@settings(max_examples=200)
@given(steps=st.lists(st.integers(0, 20), max_size=3), value=NASTY)
@example(steps=[1], value=[])
def test_whatever_was_kept_as_scores_is_read_or_refused_as_a_wrong_value(steps: list[int], value: object) -> None:
    whole = json.loads(replace(score(COUNTS, CLASSES, 7), label_sets={"synthia_16": 0.5}).to_json())
    with suppress(ValueError, KeyError, OverflowError):
        scores = Scores.from_json(json.dumps(replaced(whole, steps, value)))
        assert len(scores.classes) == len(scores.iou)
        table(scores)
