"""The cycles of one pool: which there are, which are consistent, and what each weighs."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Cycles(NamedTuple):
    """The cycles of all N_s source pixels of a pool, the same on each of its ranks."""

    matches: torch.Tensor
    """int64 [N_s]: best target pixel j* of each."""
    labels: torch.Tensor
    """int64 [N_s]"""
    consistent: torch.Tensor
    """bool [N_s]"""
    weights: torch.Tensor | None
    """[N_s], target weight of j*; None where every cycle weighs 1."""
    contrast: Callable[[torch.Tensor | None], torch.Tensor]
    """Take the loss of this rank's share of the consistent cycles: a scalar with a graph, which summed over the pool's
    ranks is `-sum_i w_i s_y(i) [log p(i -> j*) + log p(j* -> i*)]`. Its argument is the scale s of each class, [K],
    or None for 1. Collective over the pool's ranks; to be called once."""


def are_consistent(
    labels: torch.Tensor, end_labels: torch.Tensor, seen_classes: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Whether each cycle ends in the class it started from, and passes through it where a teacher sees one. bool [n].

    Args:
        labels: int64 [n], of the source pixels i.
        end_labels: int64 [n], of the source pixels i* in which the cycles end.
        seen_classes: int64 [n], of the target pixels j* between them; None leaves them unchecked.
        ignore_index: Label that neither starts nor ends a cycle.
    """
    consistent = (labels == end_labels) & (labels != ignore_index)
    return consistent if seen_classes is None else consistent & (labels == seen_classes)


def scaled(weights: torch.Tensor, classes: torch.Tensor, class_scale: torch.Tensor | None) -> torch.Tensor:
    """Weights [n] of cycles, each times the scale of its class [n]; scales are fp64 [K], or None for 1."""
    return weights if class_scale is None else (weights * class_scale[classes]).to(weights.dtype)
