"""The definition: dense, differentiated by autograd, to be read and to be compared with."""

from typing import NamedTuple

import torch

from dist_pca.association.cycles import Cycles, are_consistent, scaled
from dist_pca.association.exchange import all_gather
from dist_pca.association.options import Inputs, Options
from dist_pca.association.pool import Pool
from dist_pca.association.similarity import keys, normalised
from dist_pca.association.statistics import temperature


class Rows(NamedTuple):
    """Queries and keys of both directions of a cycle."""

    source_query: torch.Tensor
    """[n, C], the source pixels that start cycles."""
    target_key: torch.Tensor
    """[N_t, C], candidates of the match source → target."""
    target_query: torch.Tensor
    """[N_t, C]"""
    source_key: torch.Tensor
    """[N_s, C], candidates of the match target → source."""


class Contrast(NamedTuple):
    """Matches of n source pixels and back, and the log-likelihood of both."""

    match: torch.Tensor
    """int64 [n]: best target pixel of each, j*."""
    end: torch.Tensor
    """int64 [n]: best source pixel of that one, i*."""
    forward: torch.Tensor
    """[n], `log p(i -> j*)`, with a graph."""
    backward: torch.Tensor
    """[n], `log p(j* -> i*)`, with a graph."""


def contrast(rows: Rows, guide: Rows | None, detach_statistics: bool) -> Contrast:
    """Associate source pixels with target pixels and back (PLCA, equations 1 to 6).

    Args:
        rows: Queries and keys of both softmaxes.
        guide: Queries and keys that choose the matches in their place.
        detach_statistics: Stop the gradient through each row's standard deviation.
    """
    # D(i, j) and j*(i) = argmax_j D(i, j).
    forward = rows.source_query @ rows.target_key.T
    match = (forward if guide is None else guide.source_query @ guide.target_key.T).argmax(dim=1)
    # D(j*, i') and i*(i) = argmax_i' D(j*, i').
    backward = rows.target_query[match] @ rows.source_key.T
    end = (backward if guide is None else guide.target_query[match] @ guide.source_key.T).argmax(dim=1)
    return Contrast(
        match,
        end,
        _log_likelihood(forward, match, detach_statistics),
        _log_likelihood(backward, end, detach_statistics),
    )


def _log_likelihood(similarity: torch.Tensor, best: torch.Tensor, detach_statistics: bool) -> torch.Tensor:
    # log p = log softmax(D / sigma) at the match; the mean that contrast normalisation subtracts drops out.
    sigma = temperature(similarity.detach() if detach_statistics else similarity)
    return torch.log_softmax(similarity / sigma, dim=1).gather(1, best[:, None])[:, 0]


def find_cycles(inputs: Inputs, pool: Pool, options: Options) -> Cycles:
    """Find the cycles of a pool, rows gathered with autograd. Collective over its ranks, as is the backward pass."""
    source, target = (_normalised(rows, options) for rows in (inputs.source, inputs.target))
    guide = None
    if inputs.guide is not None:
        guide_source, guide_target = (_normalised(x.to(source.dtype), options) for x in inputs.guide)
        guide = _rows(guide_source, guide_target, None, pool, options)
    rows = _rows(source, target, guide if options.guide_keys else None, pool, options)
    found = contrast(rows, guide, options.detach_statistics)

    labels = pool.gather(inputs.labels, pool.source_counts)
    seen = weights = None
    if inputs.target_classes is not None:
        seen = pool.gather(inputs.target_classes, pool.target_counts)[found.match]
    if inputs.target_weights is not None:
        weights = pool.gather(inputs.target_weights.to(source.dtype), pool.target_counts)[found.match]
    consistent = are_consistent(inputs.labels, labels[found.end], seen, options.ignore_index)

    def loss_sum(class_scale: torch.Tensor | None) -> torch.Tensor:
        weight = torch.ones_like(found.forward.detach()) if weights is None else weights
        weight = scaled(weight[consistent], inputs.labels[consistent], class_scale)
        total = sum((x.sum() * 0 for x in rows), start=weight.new_zeros(()))
        for log_probability in (found.forward, found.backward):
            total = total - (weight * log_probability[consistent]).sum()
        return total

    return Cycles(
        pool.gather(found.match, pool.source_counts),
        labels,
        pool.gather(consistent, pool.source_counts),
        None if weights is None else pool.gather(weights, pool.source_counts),
        loss_sum,
    )


def _rows(source: torch.Tensor, target: torch.Tensor, keys_of: Rows | None, pool: Pool, options: Options) -> Rows:
    """Queries of normalised rows, and their keys or those of others, over the pool."""
    target_pool = _gathered(target, pool)
    if keys_of is not None:
        return Rows(source, keys_of.target_key, target_pool, keys_of.source_key)
    source_pool = _gathered(source, pool)
    return Rows(source, keys(target_pool, options.similarity), target_pool, keys(source_pool, options.similarity))


def _gathered(rows: torch.Tensor, pool: Pool) -> torch.Tensor:
    if pool.ranks == 1:
        return rows
    # Rows go out to every other rank, and where they have a gradient as many bytes come back.
    pool.sent_bytes += (1 + rows.requires_grad) * (pool.ranks - 1) * rows.numel() * rows.element_size()
    return all_gather(rows, pool.group)


def _normalised(rows: torch.Tensor, options: Options) -> torch.Tensor:
    return normalised(rows.to(torch.promote_types(rows.dtype, torch.float32)), options.similarity)
