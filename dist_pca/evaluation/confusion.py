"""Confusion matrices, and the scores computed from them.

Scores are computed from integer counts over all pixels of all images, so they do not depend on the world size.
"""

import torch

from dist_pca.classes import IGNORE_INDEX

_PIXELS = 1 << 22
"""Pixels counted at once; each takes some 40 bytes meanwhile."""


def confusion_matrix(
    prediction: torch.Tensor, label: torch.Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Count pixels by true and predicted class.

    Args:
        prediction: Train ids below `num_classes`, any shape and integer type.
        label: True train ids of the same shape.
        num_classes: Number of classes K.
        ignore_index: True train id of pixels that are not counted.

    Returns:
        int64, K x K; entry (t, p) counts pixels of class t predicted as p.

    Raises:
        ValueError: a label is neither below `num_classes` nor the ignore index.
    """
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=label.device)
    for true, predicted in zip(
        torch.split(label.flatten(), _PIXELS), torch.split(prediction.flatten(), _PIXELS), strict=True
    ):
        counted = true != ignore_index
        found = torch.bincount(true[counted].long() * num_classes + predicted[counted].long(), minlength=len(counts))
        if len(found) > len(counts):
            raise ValueError(f"a label is neither below {num_classes} nor the ignore index {ignore_index}")
        counts += found
    return counts.view(num_classes, num_classes)


def iou(confusion: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each class, float64, K.

    It is nan for a class that occurs neither in the labels nor in the prediction.
    """
    intersection = confusion.diagonal().double()
    return intersection / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())


def precision(confusion: torch.Tensor) -> torch.Tensor:
    """Share of each class's predicted pixels that are of this class, float64, K; nan for a class never predicted."""
    return confusion.diagonal().double() / confusion.sum(0)


def recall(confusion: torch.Tensor) -> torch.Tensor:
    """Share of each class's labelled pixels that are predicted correctly, float64, K; nan for a class without any."""
    return confusion.diagonal().double() / confusion.sum(1)


def f1(confusion: torch.Tensor) -> torch.Tensor:
    """F1 score of each class, float64, K: the harmonic mean of precision and recall, which equals the Dice coefficient.

    It is nan for a class that occurs neither in the labels nor in the prediction.
    """
    return 2 * confusion.diagonal().double() / (confusion.sum(0) + confusion.sum(1))


def mean(values: torch.Tensor, members: list[int] | None = None) -> float:
    """Mean of the scores of some classes, by index, or of all, without those that are nan; nan if none is left.

    With `iou` it is the mIoU. All pixels are counted: a road pixel that is predicted as a class outside `members`
    lowers the IoU of road.
    """
    return (values if members is None else values[members]).nanmean().item()


def pixel_accuracy(confusion: torch.Tensor) -> float:
    """Share of labelled pixels that are predicted correctly; nan if there are none."""
    return (confusion.diagonal().sum().double() / confusion.sum()).item()
