"""Scores as files: by class, by image, and the confusion matrix as numbers and as a picture."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dist_pca.evaluation.confusion import iou, mean, pixel_accuracy
from dist_pca.evaluation.report import COLUMNS, Scores

_MAX_NUMBERS = 30
"""Largest number of classes for which a picture has a number in each cell."""
_MAX_EDGE = 24.0
"""Inches of 160 pixels: names of more classes than fit are drawn smaller, since memory grows with the square."""


class ImageScores(NamedTuple):
    """Scores of one image."""

    key: str
    pixels: int
    """Number of labelled pixels."""
    pixel_accuracy: float
    mean_iou: float
    iou: tuple[float, ...]
    """Intersection over union of each class; nan for a class that is neither in the labels nor in the prediction."""


def image_scores(key: str, confusion: torch.Tensor, unscored: Sequence[int] = ()) -> ImageScores:
    """Scores of an image from its confusion matrix, K x K, without those of the classes of some train ids."""
    values = iou(confusion)
    values[list(unscored)] = math.nan
    return ImageScores(key, int(confusion.sum()), pixel_accuracy(confusion), mean(values), tuple(values.tolist()))


def write_scores(folder: Path, scores: Scores, confusion: torch.Tensor, images: Iterable[ImageScores]) -> None:
    """Write scores into a folder; scores are in 0..1, and empty where there is nothing to score.

    The files are `scores.json`; `classes.csv`, one line per class and their mean; `images.csv`, one line per image;
    `confusion.csv`, the number of pixels of each true class (line) that are predicted as each class (column); and
    `confusion.png` if matplotlib is installed, the same as shares of the true class.

    Args:
        folder: An existing folder.
        scores: Scores on all images.
        confusion: Their confusion matrix, K x K.
        images: Scores of each image.
    """
    (folder / "scores.json").write_text(scores.to_json() + "\n", encoding="utf-8")
    kinds = [name for name in COLUMNS if getattr(scores, name)]
    by_class = zip(scores.classes, confusion.sum(1).tolist(), *(getattr(scores, name) for name in kinds), strict=True)
    means = [getattr(scores, f"mean_{name}") for name in kinds]
    _write_csv(
        folder / "classes.csv",
        [["class", "pixels", *kinds], *by_class, ["mean", int(confusion.sum()), *means]],
    )
    _write_csv(
        folder / "images.csv",
        [
            ["image", "pixels", "pixel_accuracy", "mean_iou", *(f"iou {name}" for name in scores.classes)],
            *((*line[:-1], *line.iou) for line in images),
        ],
    )
    counts = ((name, *row) for name, row in zip(scores.classes, confusion.tolist(), strict=True))
    _write_csv(folder / "confusion.csv", [["true class", *scores.classes], *counts])
    draw_confusion(confusion, scores.classes, folder / "confusion.png")


def draw_confusion(confusion: torch.Tensor, classes: Sequence[str], file: Path) -> bool:
    """Draw a confusion matrix, K x K, as shares of the true class; False and no file without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    edge = min(3 + 0.36 * len(classes), _MAX_EDGE)
    figure = Figure(figsize=(edge + 1, edge), layout="constrained")
    axes = figure.subplots()
    shares = confusion.double() / confusion.sum(1, keepdim=True)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's pixels")
    # Dollar signs in names would start formulas.
    names = [name.replace("$", r"\$") for name in classes]
    size = min(10.0, 72 * 0.6 * edge / len(names))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(classes) <= _MAX_NUMBERS:
        for row, column in (shares >= 0.005).nonzero().tolist():
            share = float(shares[row, column])
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.savefig(file, dpi=160)
    return True


def _write_csv(file: Path, lines: Iterable[Iterable[object]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        for line in lines:
            writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in line])
