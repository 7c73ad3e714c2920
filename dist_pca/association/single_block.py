"""Retrieval with all keys in a single block: a tile has whole rows, so a row's softmax comes from one matmul.

Temperature, log-sum-exp and both gradients are computed from the tile while it is in the cache.
"""

import math

import torch

from dist_pca.association.method import SIGMA_EPSILON, are_consistent
from dist_pca.association.retrieval import RetrievalPass, RowMatches
from dist_pca.association.tiles import backward_matmuls, matmul, row_blocks, row_maximum, upcast

SHAPE_MULTIPLE = 64
"""Numbers of rows are rounded up to a multiple of this where there is a choice, so that a few matmul shapes recur."""
CPU_PART_BYTES = 2 << 20
"""Memory of the part of a tile that a CPU passes over several times [bytes, in fp32]."""
BACK_ROWS = 128
"""Matched targets that are matched back at a time, while the forward tile is kept."""


def match_single_block(retrieval: RetrievalPass, rows: torch.Tensor) -> RowMatches:
    """Find the best key of each of some queries (PLCA, equations 1 and 2).

    Args:
        retrieval: Queries and keys.
        rows: int64 [k], queries.
    """
    index = torch.empty_like(rows)
    for _, block, _ in retrieval.keys.blocks():
        for part in _row_blocks(len(rows), block):
            index[part] = _best_keys(_tile(retrieval, rows[part], block)[1])
    return RowMatches(index)


def backward_single_block(
    retrieval: RetrievalPass, rows: torch.Tensor, matches: RowMatches, weight: torch.Tensor
) -> torch.Tensor:
    """Compute `-sum_i weight_i log p_i(match_i)` and add its gradients to queries and keys. Collective.

    Args:
        retrieval: Queries and keys.
        rows: int64 [k], queries, each once.
        matches: Matches of these queries.
        weight: [k].
    """
    total = weight.new_zeros(())
    for _, block, gradient in retrieval.keys.blocks(retrieval.key_gradient):
        for part in _row_blocks(len(rows), block):
            query, tile = _tile(retrieval, rows[part], block)
            total += _backward_tile(
                retrieval, tile, query, rows[part], matches.key_index[part], weight[part], block, gradient, given=True
            )
            # Free the tile before the next one is allocated.
            del query, tile
    return total


def find_cycles_single_block(
    forward: RetrievalPass,
    backward: RetrievalPass,
    classes: torch.Tensor,
    target_classes: torch.Tensor | None,
    target_weights: torch.Tensor | None,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the cycles of all source pixels, and contrast kept ones in the same tiles (PLCA, equations 1 to 5).

    All candidates must be local. Matched targets are matched back when a tile first needs them, so that no forward tile
    is computed twice.

    Args:
        forward: Retrieval source → target.
        backward: Retrieval target → source.
        classes: int64 [n_s] labels, `num_classes` for unlabelled pixels.
        target_classes: int64 [n_t], class that cycles through a target must have; None for any.
        target_weights: [n_t], weight of cycles through a target; None for 1.
        num_classes: Number of classes.

    Returns:
        Match j* of each source pixel, int64 [n_s]; match back i* of each matched target, int64 [n_t], -1 for others;
        and `-sum_i w_i log p(i -> j*)` over kept cycles, whose gradients have been added.
    """
    matches = torch.empty(len(classes), dtype=torch.int64, device=classes.device)
    match_back = matches.new_full((len(backward.queries.x),), -1)
    total = forward.queries.x.new_zeros(())
    all_rows = torch.arange(len(classes), device=classes.device)
    for _, block, gradient in forward.keys.blocks(forward.key_gradient):
        for part in _row_blocks(len(classes), block):
            rows = all_rows[part]
            query, tile = _tile(forward, rows, block)
            # j*(i) = argmax_j D(i, j).
            matches[part] = index = _best_keys(tile)
            # i*(j) = argmax_i D(j, i), for each distinct j* not seen before.
            targets = torch.unique(index)
            targets = targets[match_back[targets] < 0]
            targets = targets[_padded_range(len(targets), targets.device)]
            for chunk in targets.split(BACK_ROWS):
                match_back[chunk] = match_single_block(backward, chunk).key_index
            # A cycle is kept if y_i = y_i*, as the teacher's class at j*, and contributes with weight w_i = w(j*).
            seen = None if target_classes is None else target_classes[index]
            kept = are_consistent(classes[part], classes[match_back[index]], seen, num_classes)
            weight = kept.to(total.dtype)
            if target_weights is not None:
                weight *= target_weights[index]
            chosen = _padded_indices(weight > 0)
            rows, index, weight = rows[chosen], index[chosen], weight[chosen]
            if len(chosen) < len(kept):
                query, tile = query.index_select(0, chosen), tile.index_select(0, chosen)
            total += _backward_tile(forward, tile, query, rows, index, weight, block, gradient)
            del query, tile
    return matches, match_back, total


def _tile(retrieval: RetrievalPass, rows: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute queries [k, C] and their similarities to a block of keys [k, m].

    The tile has the type that the device's matmul gives: bf16 for bf16 on CPUs.
    """
    query, keys = retrieval.queries.query(rows), retrieval.keys
    tile = matmul(query.to(block.dtype), block.T)
    if keys.scale is not None and keys.shift is not None:
        # D = (q @ rows.T) * scale - q @ shift.
        tile.mul_(keys.scale).sub_((query @ keys.shift)[:, None])
    return query, tile


def _row_blocks(rows: int, block: torch.Tensor) -> list[slice]:
    return row_blocks(rows, len(block), block.device, 4 if block.is_cuda else block.element_size())


def _best_keys(tile: torch.Tensor) -> torch.Tensor:
    return torch.cat([row_maximum(upcast(part))[1] for part in torch.split(tile, _part_rows(tile))])


def _backward_tile(
    retrieval: RetrievalPass,
    tile: torch.Tensor,
    query: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    block: torch.Tensor,
    gradient: torch.Tensor | None,
    *,
    given: bool = False,
) -> torch.Tensor:
    """Compute `-sum_i weight_i log p_i(index_i)` of a tile and add its gradients (PLCA, equations 4 to 6).

    Args:
        retrieval: Queries and keys.
        tile: [k, m] similarities, overwritten.
        query: [k, C].
        rows: int64 [k], the queries' rows.
        index: int64 [k], their matches.
        weight: [k].
        block: [m, C] keys.
        gradient: [m, C], gradient buffer of the keys, or None.
        given: The matches need not be the rows' maxima, whose probability is 1 / m or more.
    """
    height = _part_rows(tile)
    sigma = query.new_empty(len(rows), 1)
    match_probability, log_probability = torch.empty_like(sigma), torch.empty_like(sigma)
    for part in (slice(start, start + height) for start in range(0, len(rows), height)):
        logits, column = upcast(tile[part]), index[part, None]
        # sigma_i = sqrt(sum_j D_ij^2 / (m - 1)) + eps: keys are centred, so a row's mean is 0.
        deviation = torch.linalg.vector_norm(logits, dim=1, keepdim=True) / math.sqrt(max(1, len(block) - 1))
        sigma[part] = deviation + SIGMA_EPSILON
        # p(i -> j) = softmax_j(D_ij / sigma_i).
        logits.div_(sigma[part])
        if given:
            # log p(i -> j) = z_ij - max z_i + log max p_i, as p itself may underflow.
            log_probability[part] = logits.gather(1, column) - logits.amax(dim=1, keepdim=True)
        probabilities = torch.softmax(logits, dim=1, out=logits)
        match_probability[part] = probabilities.gather(1, column)
        if given:
            log_probability[part] += probabilities.amax(dim=1, keepdim=True).log()
        else:
            log_probability[part] = match_probability[part].log()
        if retrieval.queries.gradients:
            # G = P - onehot, the gradient of -log p_i with respect to the logits.
            probabilities.scatter_(1, column, (match_probability[part] - 1).to(probabilities.dtype))
            if retrieval.keys.scale is not None:
                probabilities *= retrieval.keys.scale
            if probabilities.dtype != tile.dtype:
                tile[part] = probabilities
    loss = -(weight * log_probability[:, 0]).sum()
    if not retrieval.queries.gradients:
        return loss
    # dq_i = w_i / sigma_i * G_i K, and dk = G' (w / sigma * Q).
    scale = weight[:, None] / sigma
    dq = backward_matmuls(tile, block, (query * scale).to(block.dtype), gradient)
    if retrieval.d_sigma is not None:
        # d_sigma_i = -w_i / sigma_i^2 * q_i . (G_i K).
        retrieval.d_sigma[rows] = -((query * dq).sum(dim=1, keepdim=True) * scale / sigma)[:, 0]
    retrieval.queries.add_query_gradient(rows, dq.mul_(scale))
    return loss


def _part_rows(tile: torch.Tensor) -> int:
    """Return how many rows of a tile, which may have none, go through a softmax together."""
    return max(1, len(tile) if tile.is_cuda else CPU_PART_BYTES // (4 * tile.shape[1]))


def _padded_range(count: int, device: torch.device) -> torch.Tensor:
    """Return 0 to count - 1, the last repeated until the length is a multiple of `SHAPE_MULTIPLE`."""
    return torch.arange(-(-count // SHAPE_MULTIPLE) * SHAPE_MULTIPLE, device=device).clamp_(max=count - 1)


def _padded_indices(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices set in a mask [k], and others up to a multiple of `SHAPE_MULTIPLE` or k, in ascending order.

    Libraries compile and cache a program for every new matmul shape; a few shapes recur.
    """
    count = -(-int(mask.sum()) // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
