"""Scores and predictions of several networks, side by side."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from dist_pca.classes import ClassInfo
from dist_pca.console import plain_console
from dist_pca.evaluation.report import score
from dist_pca.tools.demo.comparison import compare_table, comparison_picture
from tests.evaluation.test_pictures import CLASSES as PAINTED
from tests.evaluation.test_pictures import image
from tests.evaluation.test_report import CLASSES, COUNTS, LIKE_MARKUP, text

DIFFERENCE = [("difference", 0, 1)]


def label(height: int, width: int, train_id: int) -> np.ndarray:
    return np.full((height, width), train_id, np.uint8)


def test_columns_are_input_truth_and_each_prediction() -> None:
    row = (image(60, 80), label(60, 80, 0), [label(60, 80, 0), label(60, 80, 1)])
    picture = comparison_picture([row], PAINTED, ["before", "after"])
    middles = [picture.getpixel((8 + 488 * column + 240, 200)) for column in range(4)]
    assert middles == [(10, 200, 30), (128, 64, 128), (128, 64, 128), (70, 130, 180)]


def test_without_any_truth_there_is_no_column_for_it() -> None:
    rows = [(image(60, 80), None, [label(60, 80, 1)])]
    with_truth = [(image(60, 80), label(60, 80, 1), [label(60, 80, 1)])]
    assert comparison_picture(rows, PAINTED, ["a"]).width < comparison_picture(with_truth, PAINTED, ["a"]).width


def test_a_row_without_truth_leaves_its_cell_white() -> None:
    rows = [
        (image(60, 80), label(60, 80, 0), [label(60, 80, 1)]),
        (image(60, 80), None, [label(60, 80, 1)]),
    ]
    picture = comparison_picture(rows, PAINTED, ["a"])
    assert picture.getpixel((8 + 488 + 240, 600)) == (255, 255, 255)
    assert picture.getpixel((8 + 2 * 488 + 240, 600)) == (70, 130, 180)


def test_a_row_with_another_number_of_predictions_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        comparison_picture([(image(6, 8), None, [])], PAINTED, ["a"])


def test_two_networks_stand_side_by_side_with_their_difference_and_the_best_in_bold() -> None:
    before = score(COUNTS, CLASSES, 7)
    after = score(torch.tensor([[9, 1, 0], [5, 5, 0], [0, 0, 1]]), CLASSES, 7)
    content = compare_table([("before", before), ("after", after)], DIFFERENCE)
    assert [column.header for column in content.columns] == ["class", "before", "after", "difference"]
    lines = text(content)
    assert lines[0] == ["road", "*80.0*", "60.0", "-20.0"]
    assert lines[2] == ["car", "-", "100.0", "-"]
    assert lines[-1][:3] == ["images", "7", "7"]


def test_headings_of_three_networks_are_whole_on_80_columns() -> None:
    scores = score(COUNTS, CLASSES, 7)
    runs = [(title, scores) for title in ("source only", "adapted without association", "adapted")]
    content = compare_table(runs, [("adaptation adds", 0, 2), ("association adds", 1, 2)])
    console = Console(file=io.StringIO(), width=80)
    console.print(content)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    assert printed.count("association") == 2


def test_nothing_is_bold_where_networks_are_equal() -> None:
    scores = score(COUNTS, CLASSES, 7)
    assert text(compare_table([("a", scores), ("b", scores)], DIFFERENCE))[0] == ["road", "80.0", "80.0", "+0.0"]


def test_networks_with_other_classes_share_a_table() -> None:
    other = score(torch.tensor([[1]]), (ClassInfo("bus", (0, 0, 0)),), 1)
    lines = text(compare_table([("a", score(COUNTS, CLASSES, 7)), ("b", other)], DIFFERENCE))
    assert [line[0] for line in lines[:4]] == ["road", "sky", "car", "bus"]
    assert lines[3] == ["bus", "-", "100.0", "-"]


@pytest.mark.parametrize("name", LIKE_MARKUP)
def test_names_that_look_like_markup_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    scores = score(COUNTS, (ClassInfo(name, (0, 0, 0)), *CLASSES[1:]), 7)
    plain_console().print(compare_table([(name, scores), ("b", scores)], DIFFERENCE))
    assert capsys.readouterr().out.count(name) == 2
