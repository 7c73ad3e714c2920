"""Directions whose keys come in several blocks, or go through kernels that keep no tile: temperatures come first.

With queries scaled by their temperatures the rest is a plain softmax, whose maximum and log-sum-exp are combined over
blocks; the sweep then needs nothing of a row but its log-sum-exp.
"""

import torch

from dist_pca.association import blockwise
from dist_pca.association.direction import Direction, Matched
from dist_pca.association.statistics import temperature_by_covariance

KERNEL_ROWS = 1 << 16
"""Query rows that one fused kernel takes at once: as many scaled copies are made."""


def match_split_rows(direction: Direction, rows: torch.Tensor) -> Matched:
    """Match some query rows [k]. Collective."""
    queries, keys = direction.queries, direction.keys
    covariance = direction.key_side.covariance()
    sigma = torch.cat([temperature_by_covariance(queries.query(part), covariance) for part in torch.split(rows, 1024)])
    best = torch.zeros_like(rows)
    value, log_sum = (torch.full_like(sigma[:, 0], -torch.inf) for _ in range(2))
    match = _kernels(direction).match
    for offset, block, _ in keys.passes():
        for part in _row_blocks(direction, len(rows), len(block)):
            scaled = (queries.query(rows[part]) / sigma[part]).to(block.dtype)
            found = match(scaled, block, log_sum=True, deterministic=direction.deterministic)
            place = found.best + offset
            # Blocks come in another order on every rank; of equals the lowest place wins on all.
            better = (found.value > value[part]) | ((found.value == value[part]) & (place < best[part]))
            best[part] = torch.where(better, place, best[part])
            value[part] = torch.where(better, found.value, value[part])
            assert found.log_sum is not None
            log_sum[part] = torch.logaddexp(log_sum[part], found.log_sum)
    return Matched(best, value, log_sum, sigma)


def sweep_split_rows(direction: Direction, rows: torch.Tensor, matched: Matched, weight: torch.Tensor) -> torch.Tensor:
    """`-sum_i weight_i log p_i(best_i)` over some query rows [k]; its gradients are added to both sides. Collective."""
    queries, keys = direction.queries, direction.keys
    assert matched.value is not None
    assert matched.log_sum is not None
    assert matched.sigma is not None
    total = (weight * (matched.log_sum - matched.value)).sum()
    if direction.key_gradient is None:
        return total
    sweep = _kernels(direction).sweep
    scale = weight[:, None] / matched.sigma
    for offset, block, gradient in keys.passes(direction.key_gradient):
        assert gradient is not None
        for part in _row_blocks(direction, len(rows), len(block)):
            query = queries.query(rows[part])
            weighted = query * scale[part]
            product = sweep(
                (query / matched.sigma[part]).to(block.dtype),
                block,
                weighted.to(block.dtype),
                matched.log_sum[part],
                gradient,
                deterministic=direction.deterministic,
            )
            best = matched.best[part] - offset
            here = ((best >= 0) & (best < len(block))).nonzero()[:, 0]
            product[here] -= block[best[here]].to(product.dtype)
            # Unlike index_add_, this adds repeated rows in one order on every device.
            gradient.index_put_((best[here],), -weighted[here], accumulate=True)
            if direction.slope is not None:
                slope = (query * product).sum(dim=1) * scale[part, 0] / matched.sigma[part, 0]
                direction.slope[rows[part]] -= slope
            queries.add_query_gradient(rows[part], product.mul_(scale[part]))
    return total


def _kernels(direction: Direction):  # type: ignore[no-untyped-def]
    if not direction.triton:
        return blockwise
    from dist_pca.association import triton_kernels

    return triton_kernels


def _row_blocks(direction: Direction, rows: int, columns: int) -> list[slice]:
    if direction.triton:
        return [slice(start, start + KERNEL_ROWS) for start in range(0, rows, KERNEL_ROWS)]
    return blockwise.row_blocks(rows, columns, direction.queries.x.device)
