"""Means over the elements of all ranks."""

import torch

from dist_pca.distributed import all_reduce_sum, world_size


def world_mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Compute `W * local sum / global count`, whose average over the W ranks is the mean over all ranks' elements.

    The average of gradients is the gradient of that mean. Collective. If the global count is 0, the result is 0, with a
    graph. A sum of weights may take the place of the count.
    """
    everyone = all_reduce_sum(count.to(total.dtype))
    return world_size() * total / torch.where(everyone > 0, everyone, 1)
