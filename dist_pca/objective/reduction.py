"""Means over the elements of all ranks."""

import torch

from dist_pca.association.communication import all_reduce_sum, world_size


def world_mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`W * local sum / global count`: gradients averaged over the W ranks, and so the values, are those of the mean.

    Collective. A count of 0 on all ranks gives 0 with a graph.
    """
    return world_size() * total / all_reduce_sum(count.to(total.dtype)).clamp(min=1)
