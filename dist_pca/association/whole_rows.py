"""Directions whose keys lie here in one block: a tile holds whole rows, so all of a row comes from one product.

Temperature, log-sum-exp and both gradients are taken from the tile while it is in the cache.
"""

import math

import torch

from dist_pca.association.blockwise import products, row_blocks, row_maximum, scores
from dist_pca.association.direction import Direction
from dist_pca.association.statistics import SIGMA_EPSILON


def match_whole_rows(direction: Direction, rows: torch.Tensor) -> torch.Tensor:
    """Best key of each of some query rows [k], int64 [k]."""
    best = torch.empty_like(rows)
    for _, block, _ in direction.keys.passes():
        for part in row_blocks(len(rows), len(block), block.device):
            best[part] = row_maximum(scores(direction.queries.query(rows[part]).to(block.dtype), block))[1]
    return best


def sweep_whole_rows(
    direction: Direction, rows: torch.Tensor, best: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """`-sum_i weight_i log p_i(best_i)` over some query rows [k]; its gradients are added to both sides. Collective."""
    total = weight.new_zeros(())
    for _, block, gradient in direction.keys.passes(direction.key_gradient):
        for part in row_blocks(len(rows), len(block), block.device):
            query = direction.queries.query(rows[part])
            tile = scores(query.to(block.dtype), block)
            total += _sweep_tile(direction, tile, query, rows[part], best[part], weight[part], block, gradient)
    return total


def match_and_sweep_whole_rows(
    direction: Direction, rows: torch.Tensor, votes: torch.Tensor, key_labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match some query rows [k] and sweep those that close a cycle, each tile at once. Collective.

    Args:
        direction: From target to source.
        rows: Matched target positions.
        votes: [k, K + 1], source positions of each class that matched them; the last column is 0.
        key_labels: [N_s] class of each source position, K where it has none.

    Returns:
        Best key of each row [k], and the sum as in `sweep_whole_rows`, each row weighed by the votes for the class of
        its best key.
    """
    best = torch.empty_like(rows)
    total = direction.queries.key.new_zeros(())
    for _, block, gradient in direction.keys.passes(direction.key_gradient):
        for part in row_blocks(len(rows), len(block), block.device):
            query = direction.queries.query(rows[part])
            tile = scores(query.to(block.dtype), block)
            best[part] = row_maximum(tile)[1]
            weight = votes[part].gather(1, key_labels[best[part], None])[:, 0]
            through = weight.nonzero()[:, 0]
            if len(through) < len(weight):
                tile, query, weight = tile[through], query[through], weight[through]
            kept, leads_to = rows[part][through], best[part][through]
            total += _sweep_tile(direction, tile, query, kept, leads_to, weight.to(total.dtype), block, gradient)
    return best, total


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
    # Keys are centred, so that a row's variance is its mean square.
    deviation = torch.linalg.vector_norm(tile, dim=1, keepdim=True) / math.sqrt(max(1, len(block) - 1))
    sigma = deviation + SIGMA_EPSILON
    probability = tile.div_(sigma).softmax(dim=1)
    at_best = probability.gather(1, best[:, None])
    loss = -(weight * at_best[:, 0].log()).sum()
    if gradient is None:
        return loss
    probability.scatter_(1, best[:, None], at_best - 1)
    scale = weight[:, None] / sigma
    product = products(probability, block, (query * scale).to(block.dtype), gradient)
    if direction.slope is not None:
        direction.slope[rows] = -((query * product).sum(dim=1, keepdim=True) * scale / sigma)[:, 0]
    direction.queries.query_gradient[rows] += product.mul_(scale)
    return loss
