"""Directions whose keys lie here in one block: a tile holds whole rows, so all of a row comes from one product.

Temperature, log-sum-exp and both gradients are taken from the tile while it is in the cache.
"""

import math

import torch

from dist_pca.association.blockwise import product, pull_both, row_blocks, row_maximum, widened
from dist_pca.association.cycles import are_consistent
from dist_pca.association.direction import Direction, Matched
from dist_pca.association.statistics import SIGMA_EPSILON

GROUP = 64
"""Rows come in multiples of this, where there is a choice."""
CPU_PART_BYTES = 2 << 20
"""Memory for rows of a tile in fp32 that a CPU passes over several times."""
RETURNED_ROWS = 128
"""Matched targets whose match back is taken at a time, beside a tile that is waiting for them."""


def match_whole_rows(direction: Direction, rows: torch.Tensor) -> Matched:
    """Best key of each of some query rows [k]."""
    best = torch.empty_like(rows)
    for _, block, _ in direction.keys.passes():
        for part in _row_blocks(len(rows), block):
            best[part] = _best_keys(_tile(direction, rows[part], block)[1])
    return Matched(best)


def sweep_whole_rows(direction: Direction, rows: torch.Tensor, matched: Matched, weight: torch.Tensor) -> torch.Tensor:
    """`-sum_i weight_i log p_i(best_i)` over query rows [k]; adds its gradients to queries and keys. Collective."""
    total = weight.new_zeros(())
    for _, block, gradient in direction.keys.passes(direction.key_gradient):
        for part in _row_blocks(len(rows), block):
            query, tile = _tile(direction, rows[part], block)
            total += _sweep_tile(direction, tile, query, rows[part], matched.best[part], weight[part], block, gradient)
            # Before the next one takes as much.
            del query, tile
    return total


def close_cycles(
    forward: Direction,
    backward: Direction,
    classes: torch.Tensor,
    target_classes: torch.Tensor | None,
    target_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Match all source rows [n_s] of a pool that is all here, and sweep those whose cycle is consistent, tile by tile.

    Matched targets are matched back when a tile first meets them, so no forward tile has to be made twice.

    Args:
        forward: From source to target.
        backward: From target to source.
        classes: int64 [n_s] labels, K where there is none.
        target_classes: int64 [n_t], which cycles through a target must have; None where any will do.
        target_weights: [n_t], weight of cycles through a target; None for 1.

    Returns:
        Best target of each source row [n_s]; best source of each matched target [n_t], -1 for others; the forward sum
        over consistent cycles, as in `sweep_whole_rows`.
    """
    match = torch.empty(len(classes), dtype=torch.int64, device=classes.device)
    match_back = match.new_full((len(backward.queries.x),), -1)
    total = forward.queries.x.new_zeros(())
    everywhere = torch.arange(len(classes), device=classes.device)
    for _, block, gradient in forward.keys.passes(forward.key_gradient):
        for part in _row_blocks(len(classes), block):
            rows = everywhere[part]
            query, tile = _tile(forward, rows, block)
            match[part] = best = _best_keys(tile)
            targets = torch.unique(best)
            targets = targets[match_back[targets] < 0]
            targets = targets[_in_groups(len(targets), targets.device)]
            for few in targets.split(RETURNED_ROWS):
                match_back[few] = match_whole_rows(backward, few).best
            seen = None if target_classes is None else target_classes[best]
            consistent = are_consistent(classes[part], classes[match_back[best]], seen, forward.options.num_classes)
            weight = consistent.to(total.dtype)
            if target_weights is not None:
                weight *= target_weights[best]
            chosen = _whole_groups(weight > 0)
            rows, best, weight = rows[chosen], best[chosen], weight[chosen]
            if len(chosen) < len(consistent):
                query, tile = query.index_select(0, chosen), tile.index_select(0, chosen)
            total += _sweep_tile(forward, tile, query, rows, best, weight, block, gradient)
            del query, tile
    return match, match_back, total


def _tile(direction: Direction, rows: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows as queries, and their products with the keys as the device gives them: CPUs give those of bf16 in bf16,
    and so they are kept."""
    query, keys = direction.queries.query(rows), direction.keys
    tile = product(query.to(block.dtype), block.T)
    if keys.scale is not None and keys.shift is not None:
        tile.mul_(keys.scale).sub_((query @ keys.shift)[:, None])
    return query, tile


def _row_blocks(rows: int, block: torch.Tensor) -> list[slice]:
    return row_blocks(rows, len(block), block.device, 4 if block.is_cuda else block.element_size())


def _best_keys(tile: torch.Tensor) -> torch.Tensor:
    return torch.cat([row_maximum(widened(part))[1] for part in torch.split(tile, _part_rows(tile))])


def _sweep_tile(
    direction: Direction,
    tile: torch.Tensor,
    query: torch.Tensor,
    rows: torch.Tensor,
    best: torch.Tensor,
    weight: torch.Tensor,
    block: torch.Tensor,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    height = _part_rows(tile)
    sigma = query.new_empty(len(rows), 1)
    at_best = torch.empty_like(sigma)
    for part in (slice(start, start + height) for start in range(0, len(rows), height)):
        logits, where = widened(tile[part]), best[part, None]
        # Keys are centred, so that a row's variance is its mean square.
        deviation = torch.linalg.vector_norm(logits, dim=1, keepdim=True) / math.sqrt(max(1, len(block) - 1))
        sigma[part] = deviation + SIGMA_EPSILON
        probabilities = torch.softmax(logits.div_(sigma[part]), dim=1, out=logits)
        at_best[part] = probabilities.gather(1, where)
        if direction.queries.gradients:
            probabilities.scatter_(1, where, at_best[part] - 1)
            if direction.keys.scale is not None:
                probabilities *= direction.keys.scale
            if probabilities.dtype != tile.dtype:
                tile[part] = probabilities
    loss = -(weight * at_best[:, 0].log()).sum()
    if not direction.queries.gradients:
        return loss
    # d(-log p_i) / d logits = (P - onehot) / sigma_i, so dq = (P - onehot) K / sigma and dk = (P - onehot)' Q / sigma.
    scale = weight[:, None] / sigma
    dq = pull_both(tile, block, (query * scale).to(block.dtype), gradient)
    if direction.d_sigma is not None:
        direction.d_sigma[rows] = -((query * dq).sum(dim=1, keepdim=True) * scale / sigma)[:, 0]
    direction.queries.add_query_gradient(rows, dq.mul_(scale))
    return loss


def _part_rows(tile: torch.Tensor) -> int:
    """Rows of a tile that go through a softmax together."""
    return len(tile) if tile.is_cuda else max(1, CPU_PART_BYTES // (4 * tile.shape[1]))


def _in_groups(count: int, device: torch.device) -> torch.Tensor:
    """Places 0 to count - 1, the last so often that their number is a multiple of `GROUP`."""
    return torch.arange(-(-count // GROUP) * GROUP, device=device).clamp_(max=count - 1)


def _whole_groups(wanted: torch.Tensor) -> torch.Tensor:
    """Places of the wanted ones in a mask [k], and of so many others that the number is a multiple of `GROUP`, or k.

    Libraries make a program for every new shape of a product and keep it; a few shapes recur.
    """
    count = -(-int(wanted.sum()) // GROUP) * GROUP
    return wanted.to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
