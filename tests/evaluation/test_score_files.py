import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.evaluation.report import score
from dist_pca.evaluation.score_files import draw_confusion, image_scores, write_scores

NAMES = ("road", 'a, "b"', "$x$ [red]")
CLASSES = tuple(ClassInfo(name, (0, 0, 0)) for name in NAMES)
COUNTS = torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]])


def lines(file: Path) -> list[list[str]]:
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


def test_tables_hold_scores_by_class_and_image_and_are_empty_where_there_are_none(tmp_path: Path) -> None:
    scores = score(COUNTS, CLASSES, 1, boundary=torch.tensor([[4, 2, 0], [4, 4, 0], [2, 2, 0]]))
    write_scores(tmp_path, scores, COUNTS, [image_scores("1", COUNTS)])
    assert lines(tmp_path / "classes.csv")[0] == [
        *("class", "pixels", "iou", "precision", "recall", "f1", "boundary_iou")
    ]
    assert [float(cell) for cell in lines(tmp_path / "classes.csv")[1][1:]] == pytest.approx(
        [10, 0.8, 1, 0.8, 16 / 18, 1 / 3]
    )
    assert lines(tmp_path / "classes.csv")[3] == [NAMES[2], "0", "", "", "", "", ""]
    assert lines(tmp_path / "classes.csv")[4][0:2] == ["mean", "20"]
    assert lines(tmp_path / "images.csv")[0][-3:] == [f"iou {name}" for name in NAMES]
    assert lines(tmp_path / "images.csv")[1][:3] == ["1", "20", "0.9"]
    assert lines(tmp_path / "images.csv")[1][-1] == ""
    assert lines(tmp_path / "confusion.csv") == [
        ["true class", *NAMES],
        ["road", "8", "2", "0"],
        [NAMES[1], "0", "10", "0"],
        [NAMES[2], "0", "0", "0"],
    ]


def test_an_image_is_not_scored_on_classes_that_the_shards_lack() -> None:
    found = image_scores("1", COUNTS, unscored=[1])
    assert found.mean_iou == pytest.approx(0.8)
    assert [value != value for value in found.iou] == [False, True, True]


def test_a_matrix_is_drawn_as_shares_of_the_true_class(tmp_path: Path) -> None:
    def picture(counts: torch.Tensor) -> np.ndarray:
        assert draw_confusion(counts, NAMES, tmp_path / "confusion.png")
        return np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))

    full = torch.eye(3, dtype=torch.int64)
    assert np.array_equal(picture(full), picture(7 * full))
    assert not np.array_equal(picture(full), picture(COUNTS))


@pytest.mark.parametrize("classes", [1, 70])
def test_a_matrix_of_any_number_of_classes_is_drawn_in_a_bounded_picture(tmp_path: Path, classes: int) -> None:
    assert draw_confusion(torch.eye(classes), ["x"] * classes, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) <= 4000


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_scores(tmp_path, score(COUNTS, CLASSES, 1), COUNTS, [])
    assert not (tmp_path / "confusion.png").exists()
    assert (tmp_path / "confusion.csv").exists()
