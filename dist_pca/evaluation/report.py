"""Scores of a network, and tables of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from typing_extensions import Self

from dist_pca.classes import ClassInfo, label_set_members
from dist_pca.evaluation.confusion import iou, mean_iou, pixel_accuracy


@dataclass(frozen=True)
class Scores:
    """Scores of a network on a set of images; all are in 0..1, or nan if there is nothing to score."""

    classes: tuple[str, ...]
    """Class names by train id."""
    iou: tuple[float, ...]
    """Intersection over union of each class."""
    mean_iou: float
    """Mean of `iou` over the classes that occur."""
    pixel_accuracy: float
    """Share of labelled pixels that are predicted correctly."""
    images: int
    """Number of images."""
    label_sets: dict[str, float]
    """Mean of `iou` over the classes of each named label set."""

    def to_json(self) -> str:
        """Convert to JSON, with null for nan."""
        return json.dumps({key: _nan_to_none(value) for key, value in asdict(self).items()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the result of `to_json`."""
        values = json.loads(text)
        return cls(
            classes=tuple(values["classes"]),
            iou=tuple(map(_none_to_nan, values["iou"])),
            mean_iou=_none_to_nan(values["mean_iou"]),
            pixel_accuracy=_none_to_nan(values["pixel_accuracy"]),
            images=values["images"],
            label_sets={name: _none_to_nan(value) for name, value in values["label_sets"].items()},
        )


def score(confusion: torch.Tensor, classes: Sequence[ClassInfo], images: int, label_sets: Sequence[str] = ()) -> Scores:
    """Compute the scores of a confusion matrix over `classes`.

    The mean of a label set is over its classes' IoUs in the whole matrix; pixels of other classes are counted too.

    Raises:
        UserError: a label set is unknown or has a class that is not among `classes`.
    """
    members = label_set_members(label_sets, classes)
    return Scores(
        classes=tuple(info.name for info in classes),
        iou=tuple(iou(confusion).tolist()),
        mean_iou=mean_iou(confusion),
        pixel_accuracy=pixel_accuracy(confusion),
        images=images,
        label_sets={name: mean_iou(confusion, indices) for name, indices in members.items()},
    )


def table(scores: Scores, title: str = "IoU") -> Table:
    """Tabulate one network's scores in per cent."""
    return compare_table([(title, scores)])


def compare_table(
    runs: Sequence[tuple[str, Scores]], differences: Sequence[tuple[str, int, int]] | None = None
) -> Table:
    """Tabulate networks' scores side by side in per cent, the best of each row in bold.

    A dash means that there is nothing to score.

    Args:
        runs: Title and scores of each network.
        differences: Columns of differences in percentage points: title, index of the network that is subtracted, and of
            the one that it is subtracted from. None compares two networks, and no more than two.
    """
    if differences is None:
        differences = [("difference", 0, 1)] if len(runs) == 2 else []
    result = Table("class")
    for title in (*(title for title, _ in runs), *(title for title, _, _ in differences)):
        result.add_column(title, justify="right")
    by_class, summaries = ([part(scores) for _, scores in runs] for part in (_by_class, _summary))
    for part in (by_class, summaries):
        for name in dict.fromkeys(name for values in part for name in values):
            result.add_row(name, *_cells([values.get(name, math.nan) for values in part], differences))
        result.add_section()
    result.add_row("images", *(str(scores.images) for _, scores in runs))
    return result


def _by_class(scores: Scores) -> dict[str, float]:
    return dict(zip(scores.classes, scores.iou, strict=True))


def _summary(scores: Scores) -> dict[str, float]:
    sets = {f"mIoU {name}": value for name, value in scores.label_sets.items()}
    return {"mIoU": scores.mean_iou, **sets, "pixel accuracy": scores.pixel_accuracy}


def _cells(values: Sequence[float], differences: Sequence[tuple[str, int, int]]) -> list[str]:
    known = [value for value in values if not math.isnan(value)]
    differ = len(set(known)) > 1
    cells = []
    for value in values:
        text = "-" if math.isnan(value) else f"{100 * value:.1f}"
        cells.append(f"[bold]{text}[/bold]" if differ and value == max(known) else text)
    for _, before, after in differences:
        difference = values[after] - values[before]
        cells.append("-" if math.isnan(difference) else f"{100 * difference:+.1f}")
    return cells


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_nan_to_none(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _none_to_nan(value: float | None) -> float:
    return math.nan if value is None else value
