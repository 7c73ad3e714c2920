"""The result of the cycle association loss."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Association:
    """Loss and cycle diagnostics; counts and ratios are over all ranks."""

    loss: torch.Tensor
    """Scalar with a graph on every rank, 0 where no rank keeps a cycle of positive weight. Averaged over ranks, its
    gradients and its value are those of `-sum_i w_i [log p(i -> j*) + log p(j* -> i*)] / sum_i w_i` over the kept
    cycles of all ranks (PLCA, section 3.1). Class-balanced, it is the mean over classes of that mean within each."""
    kept: torch.Tensor
    """int64, number of kept (consistent) cycles."""
    cover_ratio: torch.Tensor
    """Share of target pixels matched by at least one source pixel."""
    consistent_ratio: torch.Tensor
    """Share of labelled source pixels whose cycle is consistent."""
    correct_ratio: torch.Tensor
    """Share of matches whose target pixel truly has the source pixel's class; nan without target labels."""
    kept_correct_ratio: torch.Tensor
    """Share of kept cycles whose target pixel truly has the source pixel's class; nan without target labels."""
    kept_per_class: torch.Tensor
    """int64 [num_classes], kept cycles by class."""
    confusion: torch.Tensor
    """int64 [num_classes, num_classes], matches by class of the source pixel (rows) and true class of the matched
    target pixel (columns), where both are known; zeros without target labels."""
    kept_confusion: torch.Tensor
    """int64 [num_classes, num_classes], `confusion` of the kept cycles alone."""
    nats_over_chance: torch.Tensor
    """InfoNCE lower bound on mutual information, `ln N_s + ln N_t - loss` [nats], both directions together. Over
    several candidate sets `ln N_s + ln N_t` is averaged with the loss's weights; nan where no cycle has weight."""
    exchanged_bytes: torch.Tensor
    """int64, bytes of keys, matches and gradients sent by each rank to others, mean over ranks."""
