"""Adaptive label smoothness (PLCA, section 3.3)."""

import torch

from dist_pca.objective.reduction import world_mean


def smoothness(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean over pixels of `sg(l / threshold - 1) * l`, where `l` is the mean of `-log P` over classes. Collective.

    The gradient sharpens the prediction of a pixel whose `l` is below the threshold, and smooths it if `l` is above.
    The mean is over the pixels of all ranks.

    Args:
        logits: [B, K, h, w].
        threshold: lambda of the paper, in nats.
    """
    mean_negative_log = -torch.log_softmax(logits, dim=1).mean(dim=1)
    weighted = (mean_negative_log.detach() / threshold - 1) * mean_negative_log
    return world_mean(weighted.sum(), torch.full((), weighted.numel(), device=logits.device))
