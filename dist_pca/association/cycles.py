"""Cycles of all source pixels: matches, consistency and weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Cycles(NamedTuple):
    """Cycles of all N_s source pixels, the same on each rank whose pixels are candidates."""

    matches: torch.Tensor
    """int64 [N_s], best target pixel j* of each."""
    labels: torch.Tensor
    """int64 [N_s], labels of the source pixels."""
    consistent: torch.Tensor
    """bool [N_s], whether each cycle is consistent."""
    weights: torch.Tensor | None
    """[N_s], target weight of j*; None where every cycle has weight 1."""
    contrast: Callable[[torch.Tensor | None], torch.Tensor]
    """Compute the loss of this rank's share of the consistent cycles from the scale s of each class, [K], or None for
    1: a scalar with a graph, whose sum over ranks is `-sum_i w_i s_y(i) [log p(i -> j*) + log p(j* -> i*)]`.
    Collective; to be called once."""


def are_consistent(
    labels: torch.Tensor, end_labels: torch.Tensor, seen_classes: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Check cycle consistency, `y_i = y_i*` (PLCA, equation 3), and the teacher's class at j* if there is one.

    Args:
        labels: int64 [n], labels of the source pixels i.
        end_labels: int64 [n], labels of the source pixels i* in which the cycles end.
        seen_classes: int64 [n], teacher's classes of the matched target pixels j*; None to leave them unchecked.
        ignore_index: Label of pixels that neither start nor end a cycle.

    Returns:
        bool [n].
    """
    consistent = (labels == end_labels) & (labels != ignore_index)
    return consistent if seen_classes is None else consistent & (labels == seen_classes)


def scale_by_class(weights: torch.Tensor, classes: torch.Tensor, class_scale: torch.Tensor | None) -> torch.Tensor:
    """Multiply the weight of each cycle by the scale of its class.

    Args:
        weights: [n].
        classes: int64 [n].
        class_scale: fp64 [K]; None for 1.
    """
    return weights if class_scale is None else (weights * class_scale[classes]).to(weights.dtype)
