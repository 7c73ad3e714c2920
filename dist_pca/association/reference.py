"""The definition: dense, differentiated by autograd, to be read and to be compared with."""

from typing import NamedTuple

import torch

from dist_pca.association.statistics import temperature


class Cycles(NamedTuple):
    """What the cycles of one block of source rows through one pool give."""

    loss_sum: torch.Tensor
    """Scalar, with a graph: minus the sum over kept rows of both log-probabilities."""
    match: torch.Tensor
    """int64 [n]: each source row's best target in the pool, j*."""
    returned: torch.Tensor
    """int64 [n]: that target's best source in the pool, i*."""
    kept: torch.Tensor
    """bool [n]: the cycle ends in the class it started from."""


def cycles(
    source_query: torch.Tensor,
    target_key: torch.Tensor,
    target_query: torch.Tensor,
    source_key: torch.Tensor,
    labels: torch.Tensor,
    pool_labels: torch.Tensor,
    ignore_index: int,
    detach_statistics: bool,
) -> Cycles:
    """Associate n source rows with N_t targets and back with N_s sources (PLCA, equations 1 to 6).

    Args:
        source_query: [n, C], the rows that start cycles.
        target_key: [N_t, C], candidates of the forward match.
        target_query: [N_t, C], the rows that lead back.
        source_key: [N_s, C], candidates of the backward match.
        labels: int64 [n].
        pool_labels: int64 [N_s].
        ignore_index: Label that neither starts nor ends a cycle.
        detach_statistics: Stop the gradient through each row's standard deviation.
    """
    forward = source_query @ target_key.T
    match = forward.argmax(dim=1)
    backward = target_query[match] @ source_key.T
    returned = backward.argmax(dim=1)
    kept = (labels == pool_labels[returned]) & (labels != ignore_index)

    loss_sum = source_query.sum() * 0 + target_key.sum() * 0 + target_query.sum() * 0 + source_key.sum() * 0
    for similarity, best in ((forward, match), (backward, returned)):
        sigma = temperature(similarity.detach() if detach_statistics else similarity)
        log_probability = torch.log_softmax(similarity / sigma, dim=1).gather(1, best[:, None])[:, 0]
        loss_sum = loss_sum - log_probability[kept].sum()
    return Cycles(loss_sum, match, returned, kept)
