"""Directions whose keys come in several blocks, or go through kernels that keep no tile: temperatures come first.

With queries scaled by their temperatures the rest is a plain softmax, whose maximum and log-sum-exp are combined over
blocks; the sweep then needs nothing of a row but its log-sum-exp.
"""

import torch

from dist_pca.association import blockwise
from dist_pca.association.blockwise import widened
from dist_pca.association.direction import Direction, Matched
from dist_pca.association.statistics import temperature_by_covariance

KERNEL_ROWS = 1 << 16
"""Query rows that one fused kernel takes at once: as many scaled copies are made."""


def match_split_rows(direction: Direction, rows: torch.Tensor, given: torch.Tensor | None = None) -> Matched:
    """Match some query rows [k], and take the sums that their softmax needs. Collective.

    Args:
        direction: Queries and candidates.
        rows: int64 [k].
        given: int64 [k], matches that were chosen elsewhere and are only to be compared with all candidates.
    """
    queries, keys = direction.queries, direction.keys
    sigma = _temperatures(direction, rows)
    best = torch.zeros_like(rows) if given is None else given
    value, log_sum = (torch.full_like(sigma[:, 0], -torch.inf) for _ in range(2))
    match = _kernels(direction).match
    for offset, block, _ in keys.passes():
        for part in _row_blocks(direction, len(rows), len(block)):
            scaled = (queries.query(rows[part]) / sigma[part]).to(block.dtype)
            found = match(scaled, block, log_sum=direction.softmax, deterministic=direction.options.deterministic)
            if given is None:
                place = found.best + offset
                # Blocks come in another order on every rank; of equals the lowest place wins on all.
                better = (found.value > value[part]) | ((found.value == value[part]) & (place < best[part]))
                best[part] = torch.where(better, place, best[part])
                value[part] = torch.where(better, found.value, value[part])
            else:
                here, at = _in_block(given[part], offset, len(block))
                value[part.start + here] = (widened(scaled[here]) * widened(block[at])).sum(dim=1)
            if direction.softmax:
                log_sum[part] = torch.logaddexp(log_sum[part], found.log_sum)
    return Matched(best, value, log_sum, sigma) if direction.softmax else Matched(best)


def sweep_split_rows(direction: Direction, rows: torch.Tensor, matched: Matched, weight: torch.Tensor) -> torch.Tensor:
    """`-sum_i weight_i log p_i(best_i)` over query rows [k]; adds its gradients to queries and keys. Collective."""
    queries, keys = direction.queries, direction.keys
    if matched.log_sum is None:
        matched = match_split_rows(direction, rows, given=matched.best)
    assert matched.value is not None
    assert matched.log_sum is not None
    assert matched.sigma is not None
    total = (weight * (matched.log_sum - matched.value)).sum()
    if not queries.gradients:
        return total
    sweep = _kernels(direction).sweep
    scale = weight[:, None] / matched.sigma
    for offset, block, gradient in keys.passes(direction.key_gradient):
        for part in _row_blocks(direction, len(rows), len(block)):
            query = queries.query(rows[part])
            weighted = query * scale[part]
            # P K and P' Q, of all probabilities P; then the match's own part of P - onehot.
            dq = sweep(
                (query / matched.sigma[part]).to(block.dtype),
                block,
                weighted.to(block.dtype),
                matched.log_sum[part],
                gradient,
                deterministic=direction.options.deterministic,
            )
            here, at = _in_block(matched.best[part], offset, len(block))
            dq[here] -= block[at].to(dq.dtype)
            if gradient is not None:
                # Unlike index_add_, this adds repeated rows in one order on every device.
                gradient.index_put_((at,), -weighted[here], accumulate=True)
            if direction.d_sigma is not None:
                direction.d_sigma[rows[part]] -= (query * dq).sum(dim=1) * scale[part, 0] / matched.sigma[part, 0]
            queries.add_query_gradient(rows[part], dq.mul_(scale[part]))
    return total


def _temperatures(direction: Direction, rows: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row's similarities, [k, 1]; 1 where no softmax asks for it. Collective."""
    parts = torch.split(rows, 1024)
    if not direction.softmax:
        return direction.queries.x.new_ones((len(rows), 1))
    covariance = direction.candidates.covariance()
    return torch.cat([temperature_by_covariance(direction.queries.query(part), covariance) for part in parts])


def _in_block(best: torch.Tensor, offset: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which matches lie in the block of keys from `offset` on, and where in it."""
    place = best - offset
    here = ((place >= 0) & (place < length)).nonzero()[:, 0]
    return here, place[here]


def _kernels(direction: Direction):  # type: ignore[no-untyped-def]
    if not direction.triton:
        return blockwise
    from dist_pca.association import triton_kernels

    return triton_kernels


def _row_blocks(direction: Direction, rows: int, columns: int) -> list[slice]:
    if direction.triton:
        return [slice(start, start + KERNEL_ROWS) for start in range(0, rows, KERNEL_ROWS)]
    return blockwise.row_blocks(rows, columns, direction.queries.x.device)
