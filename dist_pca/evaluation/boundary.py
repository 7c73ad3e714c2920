"""Boundary IoU, which scores the outlines of classes.

It is the measure of Cheng et al. 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", summed
over images for each class. The boundary of a class is its pixels at a distance of at most d from a pixel outside the
class or outside the image; boundary IoU is intersection over union of the boundaries in labels and prediction. The
dilation rule is the paper's: d is a share of the image's diagonal (2 % in the paper), rounded to whole pixels and at
least 1, and distances are those of erosion by squares of 3 x 3 pixels (Chebyshev). Pixels without a label are no class
in either map, so that a prediction that is right wherever there are labels scores 1.
"""

import math

import torch
from torch.nn import functional as F

from dist_pca.classes import IGNORE_INDEX


def boundary_counts(prediction: torch.Tensor, label: torch.Tensor, num_classes: int, ratio: float) -> torch.Tensor:
    """Count the boundary pixels of each class in one image.

    Args:
        prediction: Train ids below `num_classes`, uint8, H x W.
        label: True train ids, uint8, H x W; 255 is ignored.
        num_classes: Number of classes K.
        ratio: Distance as a share of the image's diagonal.

    Returns:
        int64, 3 x K: boundary pixels in the labels, in the prediction, and in both.
    """
    distance = boundary_distance(label.shape[0], label.shape[1], ratio)
    maps = (label, torch.where(label == IGNORE_INDEX, label, prediction))
    true, predicted = (ids.masked_fill(_interior(ids, distance), IGNORE_INDEX) for ids in maps)
    both = true.masked_fill(true != predicted, IGNORE_INDEX)
    return torch.stack([torch.bincount(ids.flatten(), minlength=256)[:num_classes] for ids in (true, predicted, both)])


def boundary_distance(height: int, width: int, ratio: float) -> int:
    """Width of boundaries in pixels: `ratio` times the diagonal, rounded, and at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary_iou(counts: torch.Tensor) -> torch.Tensor:
    """Boundary IoU of each class from summed `boundary_counts`, float64, K; nan without any boundary pixel."""
    true, predicted, both = counts.double()
    scores: torch.Tensor = both / (true + predicted - both)
    return scores


def _interior(ids: torch.Tensor, distance: int) -> torch.Tensor:
    """Mask of the pixels around which a square of 2 * distance + 1 pixels is in the image and of one id, H x W."""
    height, width = ids.shape
    edge = 2 * distance + 1
    interior = torch.zeros_like(ids, dtype=torch.bool)
    if min(height, width) < edge:
        return interior
    inner = ids[:, distance : width - distance]
    rows = _count_in_windows(ids[:, 1:] != ids[:, :-1], edge - 1, dim=1) == 0
    columns = _count_in_windows(inner[1:] != inner[:-1], edge - 1, dim=0) == 0
    of_one_id = (_count_in_windows(rows, edge, dim=0) == edge) & columns
    interior[distance : height - distance, distance : width - distance] = of_one_id
    return interior


def _count_in_windows(mask: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Number of true entries in every window of `length` entries along a dimension."""
    before = F.pad(mask.cumsum(dim, dtype=torch.int32), (1, 0) if dim == 1 else (0, 0, 1, 0))
    return before.narrow(dim, length, before.shape[dim] - length) - before.narrow(dim, 0, before.shape[dim] - length)
