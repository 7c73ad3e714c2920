"""The same as `reference`, streamed over blocks of rows: memory linear in pixels, value and gradients in one sweep.

Nothing needs an n x m matrix. Forward matches take a row maximum; the backward direction is taken once for every
DISTINCT matched target, weighted by the kept cycles through it; forward probabilities only for kept rows. A block holds
whole rows, so each row's temperature, log-sum-exp and gradient come from the same product. The gradient of a row's
`-log p` with respect to its similarities is `(p - onehot) / sigma`.
"""

from typing import Any

import torch

from dist_pca.association.reference import Cycles
from dist_pca.association.statistics import SIGMA_EPSILON

BLOCK_BYTES = 64 << 20
"""Memory for one block of similarities."""


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
    """As `reference.cycles`; gradients are those of its loss, to rounding."""
    result = _StreamedCycles.apply(
        source_query, target_key, target_query, source_key, labels, pool_labels, ignore_index, detach_statistics
    )
    return Cycles(*result)


class _StreamedCycles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source_query: torch.Tensor,
        target_key: torch.Tensor,
        target_query: torch.Tensor,
        source_key: torch.Tensor,
        labels: torch.Tensor,
        pool_labels: torch.Tensor,
        ignore_index: int,
        detach_statistics: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        match = _best(source_query, target_key)
        middles, middle_of_row = torch.unique(match, return_inverse=True)
        middle_query = target_query[middles]
        middle_returned = _best(middle_query, source_key)
        returned = middle_returned[middle_of_row]
        kept = (labels == pool_labels[returned]) & (labels != ignore_index)

        weight = torch.zeros(len(middles), dtype=source_query.dtype, device=source_query.device)
        weight.index_add_(0, middle_of_row[kept], torch.ones_like(weight[:1]).expand(int(kept.sum())))
        through = weight > 0
        backward_sum, middle_gradient, source_key_gradient = _negative_log_probability(
            middle_query[through], source_key, middle_returned[through], weight[through], detach_statistics
        )
        forward_sum, row_gradient, target_key_gradient = _negative_log_probability(
            source_query[kept],
            target_key,
            match[kept],
            torch.ones_like(labels[kept], dtype=weight.dtype),
            detach_statistics,
        )
        source_query_gradient = torch.zeros_like(source_query)
        source_query_gradient[kept] = row_gradient
        target_query_gradient = torch.zeros_like(target_query)
        target_query_gradient[middles[through]] = middle_gradient
        ctx.save_for_backward(source_query_gradient, target_key_gradient, target_query_gradient, source_key_gradient)
        ctx.mark_non_differentiable(match, returned, kept)
        return forward_sum + backward_sum, match, returned, kept

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None, None, None)


def _row_blocks(rows: int, columns: int, element_size: int) -> list[slice]:
    height = max(1, BLOCK_BYTES // max(1, columns * element_size))
    return [slice(start, start + height) for start in range(0, rows, height)]


def _best(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Index of each query row's largest product with a key row, int64 [n]."""
    best = torch.empty(len(query), dtype=torch.int64, device=query.device)
    for rows in _row_blocks(len(query), len(key), query.element_size()):
        best[rows] = (query[rows] @ key.T).argmax(dim=1)
    return best


def _negative_log_probability(
    query: torch.Tensor, key: torch.Tensor, best: torch.Tensor, weight: torch.Tensor, detach_statistics: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`-sum_i weight_i log p_i(best_i)` and its gradients with respect to query and key."""
    total = query.new_zeros(())
    query_gradient = torch.zeros_like(query)
    key_gradient = torch.zeros_like(key)
    candidates = len(key)
    for rows in _row_blocks(len(query), candidates, query.element_size()):
        similarity = query[rows] @ key.T
        variance, mean = torch.var_mean(similarity, dim=1, keepdim=True, correction=min(1, candidates - 1))
        sigma = variance.sqrt() + SIGMA_EPSILON
        at_best = similarity.gather(1, best[rows, None])
        score = (similarity - at_best) / sigma
        log_sum = torch.logsumexp(score, dim=1, keepdim=True)
        total += (weight[rows, None] * log_sum).sum()

        gradient = torch.exp(score - log_sum)
        if not detach_statistics and candidates > 1:
            # d(-log p)/d sigma = (D_best - sum_j p_j D_j) / sigma^2, and d sigma/d D_j = (D_j - mu) / ((m - 1) sigma).
            by_sigma = -(gradient * score).sum(dim=1, keepdim=True) / sigma
            through_sigma = by_sigma * (similarity - mean) / ((candidates - 1) * (sigma - SIGMA_EPSILON))
        gradient.scatter_add_(1, best[rows, None], gradient.new_full((1, 1), -1.0).expand(len(gradient), 1))
        gradient /= sigma
        if not detach_statistics and candidates > 1:
            gradient += through_sigma
        gradient *= weight[rows, None]
        query_gradient[rows] = gradient @ key
        key_gradient.addmm_(gradient.T, query[rows])
    return total, query_gradient, key_gradient
