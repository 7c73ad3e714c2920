"""Retrieval with keys in several blocks, or by fused kernels that keep no tile: an online softmax.

Temperatures come first, from the covariance of the keys. With queries divided by them the rest is a plain softmax,
whose maximum and log-sum-exp are combined over blocks; of the softmax, the backward pass needs the log-sum-exp only.
"""

import torch

from dist_pca.association.method import temperature_by_covariance
from dist_pca.association.retrieval import BLOCK_ROWS, RetrievalPass, RowMatches
from dist_pca.association.tiles import upcast


def match_blockwise(retrieval: RetrievalPass, rows: torch.Tensor, index: torch.Tensor | None = None) -> RowMatches:
    """Match some queries, and compute the softmax statistics of their rows (PLCA, equations 1, 2 and 4). Collective.

    Args:
        retrieval: Queries and keys.
        rows: int64 [k], queries.
        index: int64 [k], matches that are given already, of which only the statistics are computed.
    """
    queries, keys, kernels = retrieval.queries, retrieval.keys, retrieval.kernels
    assert kernels is not None
    # sigma_i = sqrt(q_i' Cov(k) q_i) + eps; 1 where no softmax needs it.
    sigma = queries.x.new_ones((len(rows), 1))
    if retrieval.softmax:
        covariance = retrieval.key_pixels.key_covariance()
        parts = torch.split(rows, BLOCK_ROWS)
        sigma = torch.cat([temperature_by_covariance(queries.query(part), covariance) for part in parts])
    best = torch.zeros_like(rows) if index is None else index
    logit, logsumexp = (torch.full_like(sigma[:, 0], -torch.inf) for _ in range(2))
    for offset, block, _ in keys.blocks():
        for part in kernels.row_blocks(len(rows), len(block), queries.x.device):
            # z_ij = (q_i / sigma_i) . k_j.
            scaled = (queries.query(rows[part]) / sigma[part]).to(block.dtype)
            found = kernels.match(scaled, block, logsumexp=retrieval.softmax)
            if index is None:
                # Blocks come in another order on every rank; of equal logits the lowest index wins on all.
                candidate = found.key_index + offset
                better = (found.logit > logit[part]) | ((found.logit == logit[part]) & (candidate < best[part]))
                best[part] = torch.where(better, candidate, best[part])
                logit[part] = torch.where(better, found.logit, logit[part])
            else:
                local, column = _in_block(index[part], offset, len(block))
                products = upcast(scaled[local]) * upcast(block[column])
                logit[part.start + local] = products.sum(dim=1).to(logit.dtype)
            if found.logsumexp is not None:
                # log sum exp over all blocks so far.
                logsumexp[part] = torch.logaddexp(logsumexp[part], found.logsumexp)
    return RowMatches(best, logit, logsumexp, sigma) if retrieval.softmax else RowMatches(best)


def backward_blockwise(
    retrieval: RetrievalPass, rows: torch.Tensor, matches: RowMatches, weight: torch.Tensor
) -> torch.Tensor:
    """Compute `-sum_i weight_i log p_i(match_i)` and add its gradients to queries and keys. Collective.

    Args:
        retrieval: Queries and keys.
        rows: int64 [k], queries, each once.
        matches: Matches of these queries, with or without softmax statistics.
        weight: [k].
    """
    queries, keys, kernels = retrieval.queries, retrieval.keys, retrieval.kernels
    assert kernels is not None
    if matches.logsumexp is None:
        matches = match_blockwise(retrieval, rows, index=matches.key_index)
    assert matches.logit is not None
    assert matches.logsumexp is not None
    assert matches.sigma is not None
    # -log p_i = log sum_j exp(z_ij) - z_i,match.
    total = (weight * (matches.logsumexp - matches.logit)).sum()
    if not queries.gradients:
        return total
    scale = weight[:, None] / matches.sigma
    for offset, block, gradient in keys.blocks(retrieval.key_gradient):
        for part in kernels.row_blocks(len(rows), len(block), queries.x.device):
            query = queries.query(rows[part])
            weighted = query * scale[part]
            # P K, and dk += P' (w / sigma * Q).
            dq = kernels.backward(
                (query / matches.sigma[part]).to(block.dtype),
                block,
                weighted.to(block.dtype),
                matches.logsumexp[part],
                gradient,
            )
            # (P - onehot) K, and dk -= onehot' (w / sigma * Q).
            local, column = _in_block(matches.key_index[part], offset, len(block))
            dq[local] -= block[column].to(dq.dtype)
            if gradient is not None:
                # Unlike index_add_, this adds repeated rows in one order on every device.
                gradient.index_put_((column,), -weighted[local], accumulate=True)
            if retrieval.d_sigma is not None:
                # d_sigma_i = -w_i / sigma_i^2 * q_i . ((P - onehot) K)_i.
                retrieval.d_sigma[rows[part]] -= (query * dq).sum(dim=1) * scale[part, 0] / matches.sigma[part, 0]
            # dq_i = w_i / sigma_i * ((P - onehot) K)_i.
            queries.add_query_gradient(rows[part], dq.mul_(scale[part]))
    return total


def _in_block(index: torch.Tensor, offset: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the matches within the block of keys [offset, offset + length): their rows, and their keys in the block."""
    column = index - offset
    local = ((column >= 0) & (column < length)).nonzero()[:, 0]
    return local, column[local]
