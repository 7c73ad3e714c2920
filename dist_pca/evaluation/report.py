"""Scores of a network, and tables of them."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.table import Table
from typing_extensions import Self

from dist_pca.classes import ClassInfo, label_set_members
from dist_pca.evaluation import confusion as counted
from dist_pca.evaluation.boundary import boundary_iou


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
    precision: tuple[float, ...] = ()
    """Share of each class's predicted pixels that are of this class."""
    recall: tuple[float, ...] = ()
    """Share of each class's labelled pixels that are predicted correctly."""
    f1: tuple[float, ...] = ()
    """Harmonic mean of precision and recall of each class, which is its Dice coefficient."""
    boundary_iou: tuple[float, ...] = ()
    """Boundary IoU of each class; empty unless it was asked for."""
    mean_precision: float = math.nan
    """Mean of `precision` over the classes that are predicted."""
    mean_recall: float = math.nan
    """Mean of `recall` over the classes that have labelled pixels."""
    mean_f1: float = math.nan
    """Mean of `f1` over the classes that occur."""
    mean_boundary_iou: float = math.nan
    """Mean of `boundary_iou` over the classes that occur."""
    missing_classes: tuple[str, ...] = ()
    """Classes that the shards do not have: they have no scores and are left out of every mean."""

    def to_json(self) -> str:
        """Convert to JSON, with null for nan."""
        return json.dumps({key: _nan_to_none(value) for key, value in asdict(self).items()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the result of `to_json`; fields that an older version did not write have their defaults.

        Raises:
            ValueError: the text is not such a result.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("scores are not a JSON object")
        known = {field.name: _none_to_nan(values[field.name]) for field in fields(cls) if field.name in values}
        scores = TypeAdapter(cls).validate_python(known)
        # Older versions did not write the others.
        others = (scores.precision, scores.recall, scores.f1, scores.boundary_iou)
        wanted = len(scores.classes)
        if len(scores.iou) != wanted or any(len(part) not in (0, wanted) for part in others):
            raise ValueError("scores of other classes than listed")
        return scores


def score(
    confusion: torch.Tensor,
    classes: Sequence[ClassInfo],
    images: int,
    label_sets: Sequence[str] = (),
    *,
    boundary: torch.Tensor | None = None,
    missing: Collection[str] = (),
) -> Scores:
    """Compute the scores of a confusion matrix over `classes`.

    The mean of a label set is over its classes' IoUs in the whole matrix; pixels of other classes are counted too.

    Args:
        confusion: Pixels by true and predicted class, K x K.
        classes: Classes by train id.
        images: Number of images.
        label_sets: Names of label sets.
        boundary: Sum of `boundary_counts`, 3 x K; None for no boundary IoU.
        missing: Names of classes that cannot be in the labels; they get no scores.

    Raises:
        UserError: a label set is unknown or has a class that is not among `classes`.
    """
    members = label_set_members(label_sets, classes)
    unscored = torch.tensor([info.name in missing for info in classes], dtype=torch.bool)
    by_class = {name: getattr(counted, name)(confusion) for name in ("iou", "precision", "recall", "f1")}
    if boundary is not None:
        by_class["boundary_iou"] = boundary_iou(boundary)
    by_class = {name: values.masked_fill(unscored, math.nan) for name, values in by_class.items()}
    values: dict[str, Any] = {name: tuple(of_class.tolist()) for name, of_class in by_class.items()}
    values |= {f"mean_{name}": counted.mean(of_class) for name, of_class in by_class.items()}
    return Scores(
        classes=tuple(info.name for info in classes),
        pixel_accuracy=counted.pixel_accuracy(confusion),
        images=images,
        label_sets={name: counted.mean(by_class["iou"], indices) for name, indices in members.items()},
        missing_classes=tuple(info.name for info in classes if info.name in missing),
        **values,
    )


COLUMNS = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1", "boundary_iou": "boundary IoU"}
"""Heading of each score that a class has."""


def table(scores: Scores, title: str | None = None) -> Table:
    """Tabulate one network's scores in per cent; a dash means that there is nothing to score."""
    by_class = {name: getattr(scores, name) for name in COLUMNS if getattr(scores, name)}
    result = Table("class", title=title, title_justify="left")
    for name in by_class:
        result.add_column(COLUMNS[name], justify="right")
    for row in zip(scores.classes, *by_class.values(), strict=True):
        result.add_row(row[0], *map(per_cent, row[1:]))
    result.add_section()
    result.add_row("mean", *(per_cent(getattr(scores, f"mean_{name}")) for name in by_class))
    for name, value in scores.label_sets.items():
        result.add_row(f"mean of {name}", per_cent(value))
    result.add_row("pixel accuracy", per_cent(scores.pixel_accuracy))
    result.add_section()
    result.add_row("images", str(scores.images))
    return result


def per_cent(value: float) -> str:
    """Write a score in per cent; a dash for nan."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_nan_to_none(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _none_to_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _none_to_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [math.nan if part is None else part for part in value]
    return math.nan if value is None else value
