"""The streamed loss: memory linear in positions, value and both gradients within the forward call.

Nothing needs a matrix of all positions against all. Forward matches take a row maximum. The rank that owns a target
position takes the backward direction for it, once, however many source positions of whatever rank matched it, and
weighs it by the kept cycles through it. Forward probabilities are taken for kept rows alone. The gradient of a row's
`-log p` with respect to its similarities is `(p - onehot) / sigma`, so both gradients of a tile are one product each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dist_pca.association.direction import Direction, Matched, add_gradient_through_deviation
from dist_pca.association.pool import Keys, Pool
from dist_pca.association.side import Side
from dist_pca.association.similarity import Similarity
from dist_pca.association.split_rows import match_split_rows, sweep_split_rows
from dist_pca.association.whole_rows import close_cycles, match_whole_rows, sweep_whole_rows


class Found(NamedTuple):
    """What this rank learns of its own source positions and of the pool's."""

    loss_sum: torch.Tensor
    """Scalar with a graph. Summed over the pool's ranks it is minus the sum over kept cycles of both
    log-probabilities; a rank's own value covers its source rows forward and its target rows backward."""
    matches: torch.Tensor
    """int64 [N_s]: best target j* of every source position in the pool."""
    pool_labels: torch.Tensor
    """int64 [N_s]: their labels."""
    returned: torch.Tensor
    """int64 [n_s]: best source i* of this rank's matches."""
    kept: torch.Tensor
    """bool [n_s]: the cycle ends in the class it started from."""


@dataclass(frozen=True)
class Options:
    """How the streamed loss is computed."""

    similarity: Similarity
    num_classes: int
    ignore_index: int
    detach_statistics: bool
    bf16: bool
    """Matrix products in bf16."""
    triton: bool
    """Fused kernels instead of plain PyTorch."""
    deterministic: bool
    source_counts: list[int]
    """Source positions of each rank of the pool."""
    target_counts: list[int]


def streamed(source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, pool: Pool, options: Options) -> Found:
    """Associate source rows [n_s, C] with target rows [n_t, C] over a pool (PLCA, equations 1 to 6).

    Rows are raw features or probabilities. Collective over the pool's ranks; its backward pass is not. Gradients are
    with respect to the sum of all ranks' losses, provided that every rank scales its own alike.
    """
    return Found(*_Streamed.apply(source, target, labels, pool, options))


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, pool: Pool, options: Options
    ) -> tuple[torch.Tensor, ...]:
        gradients = any(ctx.needs_input_grad[:2])
        found, source_side, target_side = _solve(source, target, labels, pool, options, gradients)
        if gradients:
            ctx.save_for_backward(source_side.gradient(), target_side.gradient())
            ctx.dtypes = source.dtype, target.dtype
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, target = (
            (gradients[0] * saved).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return source, target, None, None, None


def _solve(
    source_rows: torch.Tensor,
    target_rows: torch.Tensor,
    labels: torch.Tensor,
    pool: Pool,
    options: Options,
    gradients: bool,
) -> tuple[Found, Side, Side]:
    counts_s, counts_t = options.source_counts, options.target_counts
    as_given = pool.ranks == 1 and options.similarity == "cosine" and not options.bf16 and not options.triton
    source, target = (
        Side(rows, options.similarity, pool, counts, as_given=as_given, gradients=gradients)
        for rows, counts in ((source_rows, counts_s), (target_rows, counts_t))
    )
    dtype = torch.bfloat16 if options.bf16 else source.x.dtype
    source_keys, target_keys = source.share(dtype), target.share(dtype)
    pool_labels = pool.gather(labels, counts_s)
    forward = _direction(source, target_keys, target, options, gradients)
    backward = _direction(target, source_keys, source, options, gradients)
    whole_rows = target_keys.whole and source_keys.whole and not options.triton
    match_rows, sweep_rows = (
        (match_whole_rows, sweep_whole_rows) if whole_rows else (match_split_rows, sweep_split_rows)
    )
    # Unlabelled positions get a class of their own, which nobody votes for.
    classes = torch.where(pool_labels == options.ignore_index, options.num_classes, pool_labels)
    first = sum(counts_t[: pool.rank])

    all_here = whole_rows and pool.ranks == 1
    if all_here:
        matches, leads_to, forward_sum = close_cycles(forward, backward, classes, options.num_classes)
        middles, votes = _votes(matches, classes, first, len(target_rows), options.num_classes)
        back = Matched(leads_to[middles])
        match = matches
    else:
        matched = match_rows(forward, torch.arange(len(labels), device=labels.device))
        match, matches = matched.best, pool.gather(matched.best, counts_s)
        middles, votes = _votes(matches, classes, first, len(target_rows), options.num_classes)
        back = match_rows(backward, middles)
        of_target = back.best.new_full((len(target_rows),), -1)
        of_target[middles] = back.best
        leads_to = pool.gather(of_target, counts_t)

    weight = votes.gather(1, classes[back.best, None])[:, 0]
    through = weight.nonzero()[:, 0]
    backward_sum = sweep_rows(backward, middles[through], back.at(through), weight[through].to(source.x.dtype))

    returned = leads_to[match]
    kept = (labels == pool_labels[returned]) & (labels != options.ignore_index)
    if not all_here:
        rows = kept.nonzero()[:, 0]
        forward_sum = sweep_rows(forward, rows, matched.at(rows), torch.ones_like(source.x[rows, 0]))

    for direction in (forward, backward):
        if direction.slope is not None:
            add_gradient_through_deviation(direction)
    return Found(forward_sum + backward_sum, matches, pool_labels, returned, kept), source, target


def _direction(queries: Side, keys: Keys, key_side: Side, options: Options, gradients: bool) -> Direction:
    exact = gradients and not options.detach_statistics and sum(keys.counts) > 1
    slope = queries.x.new_zeros(len(queries.x)) if exact else None
    return Direction(queries, keys, key_side, options.triton, options.deterministic, slope)


def _votes(
    matches: torch.Tensor, classes: torch.Tensor, first: int, count: int, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct matched ones of this rank's targets, [k], and the labelled source positions of each class that
    matched each, [k, num_classes + 1]."""
    own = (matches >= first) & (matches < first + count)
    middles, place = torch.unique(matches[own] - first, return_inverse=True)
    votes = torch.bincount(place * (num_classes + 1) + classes[own], minlength=len(middles) * (num_classes + 1))
    votes = votes.view(-1, num_classes + 1)
    votes[:, num_classes] = 0
    return middles, votes
