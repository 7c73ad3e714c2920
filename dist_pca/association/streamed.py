"""The streamed loss: memory linear in pixels, value and both gradients before autograd's backward pass.

Nothing needs a matrix of all pixels against all. Matches source → target take a row maximum. The rank that owns a
target pixel takes the direction target → source for it, once, however many source pixels of whatever rank matched it,
and weights it by the consistent cycles through it. Softmaxes are taken for consistent cycles alone. The gradient of a
row's `-log p` with respect to its similarities is `(p - onehot) / sigma`, so both gradients of a tile are one matrix
product each.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from dist_pca.association.cycles import Cycles, scaled
from dist_pca.association.direction import Direction, Matched, add_gradient_through_deviation, directions
from dist_pca.association.options import Inputs, Options
from dist_pca.association.pixels import Pixels
from dist_pca.association.pool import Pool
from dist_pca.association.split_rows import match_split_rows, sweep_split_rows
from dist_pca.association.whole_rows import close_cycles, match_whole_rows, sweep_whole_rows


class Positives(NamedTuple):
    """Query pixels on consistent cycles, each with the match that is contrasted with all candidates."""

    rows: torch.Tensor
    """int64 [k], each once."""
    matched: Matched
    classes: torch.Tensor
    """int64 [k], class of the cycles through each."""
    weights: torch.Tensor
    """[k], summed weight of these cycles."""


def find_cycles(inputs: Inputs, pool: Pool, options: Options) -> Cycles:
    """Find the cycles of a pool (PLCA, equations 1 to 3). Collective over its ranks; the backward pass is not.

    Gradients are with respect to the sum of all ranks' losses, provided that every rank scales its own alike.
    """
    gradients = torch.is_grad_enabled() and (inputs.source.requires_grad or inputs.target.requires_grad)
    with torch.no_grad():
        return _find_cycles(inputs, pool, options, gradients)


def _find_cycles(inputs: Inputs, pool: Pool, options: Options, gradients: bool) -> Cycles:
    dtype, unlabelled = torch.promote_types(inputs.source.dtype, torch.float32), options.num_classes
    student = _domains((inputs.source, inputs.target), pool, options, dtype, gradients)
    guide = None if inputs.guide is None else _domains(inputs.guide, pool, options, dtype, gradients=False)
    chooser = guide or student
    forward, backward = directions(chooser, chooser, options, softmax=guide is None)
    target_weights = None if inputs.target_weights is None else inputs.target_weights.to(dtype)
    labels = pool.gather(inputs.labels, pool.source_counts)
    # Unlabelled pixels get a class of their own, in which no cycle is consistent.
    classes = torch.where(labels == options.ignore_index, unlabelled, labels)

    # j*(i) = argmax_j D(i, j), then i*(j) = argmax_i D(j, i) for each distinct j* on the rank that owns it. Where all
    # candidates are here and no weight depends on other cycles, the forward softmax is taken in the same pass.
    fused = _single_block(forward, backward) and pool.ranks == 1 and guide is None and not options.class_balanced
    loss_sum = student[0].x.new_zeros(())
    if fused:
        matches, match_back, loss_sum = close_cycles(forward, backward, classes, inputs.target_classes, target_weights)
        matched = Matched(matches)
        targets, histogram = _matched_targets(matches, classes, pool, options)
        back = Matched(match_back[targets])
    else:
        match = match_whole_rows if _single_block(forward, backward) else match_split_rows
        matched = match(forward, torch.arange(len(inputs.labels), device=labels.device))
        matches = pool.gather(matched.best, pool.source_counts)
        targets, histogram = _matched_targets(matches, classes, pool, options)
        back = match(backward, targets)

    # A cycle through j is consistent if its label is that of i*(j), and the class that the teacher sees at j.
    target_class = classes[back.best]
    if inputs.target_classes is not None:
        target_class = torch.where(inputs.target_classes[targets] == target_class, target_class, unlabelled)
    class_of_target = target_class.new_full((len(inputs.target),), unlabelled)
    class_of_target[targets] = target_class
    consistent = classes == pool.gather(class_of_target, pool.target_counts)[matches]
    consistent &= classes < unlabelled

    # A source row weighs w_i = w(j*(i)); a target row as much as all consistent cycles through it.
    own = slice(sum(pool.source_counts[: pool.rank]), sum(pool.source_counts[: pool.rank + 1]))
    forward_weights, weights = consistent[own].to(dtype), None
    backward_weights = histogram.gather(1, target_class[:, None])[:, 0].to(dtype)
    if target_weights is not None:
        weights = pool.gather(target_weights, pool.target_counts)[matches]
        forward_weights *= weights[own]
        backward_weights *= target_weights[targets]
    at, through = (x.nonzero()[:, 0] for x in (forward_weights, backward_weights))
    if fused:
        # The forward softmax is taken already.
        at = at[:0]
    positives = (
        Positives(at, matched.at(at), classes[own][at], forward_weights[at]),
        Positives(targets[through], back.at(through), target_class[through], backward_weights[through]),
    )
    passes = (forward, backward) if guide is None else None
    keys_of = guide if options.guide_keys and guide is not None else student
    contrast = partial(_contrast, inputs, options, student, keys_of, passes, positives, loss_sum)
    return Cycles(matches, labels, consistent, weights, contrast)


def _contrast(
    inputs: Inputs,
    options: Options,
    student: tuple[Pixels, Pixels],
    keys_of: tuple[Pixels, Pixels],
    passes: tuple[Direction, Direction] | None,
    positives: tuple[Positives, Positives],
    loss_sum: torch.Tensor,
    class_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Contrast matches with all candidates (PLCA, equations 4 to 6): the loss and both gradients. Collective."""
    with torch.no_grad():
        passes = passes or directions(student, keys_of, options, softmax=True)
        sweep = sweep_whole_rows if _single_block(*passes) else sweep_split_rows
        for direction, positive in zip(reversed(passes), reversed(positives), strict=True):
            weights = scaled(positive.weights, positive.classes, class_scale)
            loss_sum = loss_sum + sweep(direction, positive.rows, positive.matched, weights)
        for direction in passes:
            if direction.d_sigma is not None:
                add_gradient_through_deviation(direction)
    source, target = student
    if not source.gradients:
        return loss_sum
    total: torch.Tensor = _WithGradients.apply(
        inputs.source, inputs.target, loss_sum, source.gradient(), target.gradient()
    )
    return total


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients with respect to two tensors are known already."""

    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, target: torch.Tensor, value: torch.Tensor, *gradients: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = source.dtype, target.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, target = (
            (gradient * saved).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return source, target, None, None, None


def _domains(
    rows: tuple[torch.Tensor, torch.Tensor], pool: Pool, options: Options, dtype: torch.dtype, gradients: bool
) -> tuple[Pixels, Pixels]:
    unnormalised = (
        pool.ranks == 1
        and options.similarity == "cosine"
        and options.dtype == "fp32"
        and options.implementation != "triton"
    )
    source, target = (
        Pixels(
            x.detach().to(dtype),
            options.similarity,
            pool,
            counts,
            unnormalised=unnormalised,
            gradients=gradients,
        )
        for x, counts in zip(rows, (pool.source_counts, pool.target_counts), strict=True)
    )
    return source, target


def _single_block(forward: Direction, backward: Direction) -> bool:
    """Whether every tile holds whole rows, so that a row's softmax comes from one matrix product."""
    return forward.keys.whole and backward.keys.whole and not forward.triton


def _matched_targets(
    matches: torch.Tensor, classes: torch.Tensor, pool: Pool, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct matched targets of this rank, int64 [k], and for each the label histogram of the source pixels that
    matched it, [k, num_classes + 1], whose last column stays 0."""
    first, count = sum(pool.target_counts[: pool.rank]), pool.target_counts[pool.rank]
    own = (matches >= first) & (matches < first + count)
    targets, place = torch.unique(matches[own] - first, return_inverse=True)
    columns = options.num_classes + 1
    histogram = torch.bincount(place * columns + classes[own], minlength=len(targets) * columns).view(-1, columns)
    histogram[:, -1] = 0
    return targets, histogram
