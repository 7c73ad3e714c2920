"""The streamed loss: memory linear in pixels, value and both gradients before autograd's backward pass.

No step needs the full similarity matrix. Matches source → target take a row maximum. The rank that owns a target pixel
retrieves in the direction target → source for it, once, however many source pixels of whatever rank matched it, and
weights it by the kept cycles through it. Softmaxes are computed for kept cycles alone. The gradient of a
row's `-log p` with respect to its similarities is `(P - onehot) / sigma`, so both gradients of a tile are one matmul
each.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from dist_pca.association.blockwise import backward_blockwise, match_blockwise
from dist_pca.association.candidates import CandidateGroup
from dist_pca.association.method import Cycles, scale_by_class
from dist_pca.association.options import Inputs, Options, Precision, Similarity
from dist_pca.association.retrieval import (
    Pixels,
    RetrievalPass,
    RowMatches,
    add_gradient_through_sigma,
    retrieval_passes,
)
from dist_pca.association.single_block import backward_single_block, find_cycles_single_block, match_single_block
from dist_pca.association.tiles import upcast


class Positives(NamedTuple):
    """Queries on kept cycles, each with the match that is contrasted with all candidates."""

    rows: torch.Tensor
    """int64 [k], queries, each once."""
    matches: RowMatches
    classes: torch.Tensor
    """int64 [k], class of the cycles through each."""
    weights: torch.Tensor
    """[k], summed weight of these cycles."""


class Matches(NamedTuple):
    """Cycles of n_s source pixels."""

    targets: torch.Tensor
    """int64 [n_s], best target pixel j* of each source pixel."""
    ends: torch.Tensor
    """int64 [n_s], best source pixel i* of that target pixel."""


def find_cycles(inputs: Inputs, candidates: CandidateGroup, options: Options) -> Cycles:
    """Find the cycles of all source pixels (PLCA, equations 1 to 3). Collective; the backward pass is not.

    Gradients are with respect to the sum of all ranks' losses, provided that all ranks scale theirs alike.

    Args:
        inputs: Pixels of this rank.
        candidates: Ranks whose pixels are candidates.
        options: Equal on all ranks.
    """
    gradients = torch.is_grad_enabled() and (inputs.source.requires_grad or inputs.target.requires_grad)
    with torch.no_grad():
        return _find_cycles(inputs, candidates, options, gradients)


def _find_cycles(inputs: Inputs, candidates: CandidateGroup, options: Options, gradients: bool) -> Cycles:
    dtype, unlabelled = torch.promote_types(inputs.source.dtype, torch.float32), options.num_classes
    student = _pixels(inputs.source.to(dtype), inputs.target.to(dtype), candidates, options, gradients=gradients)
    guide = None
    if inputs.guide is not None:
        source, target = (x.to(dtype) for x in inputs.guide)
        guide = _pixels(source, target, candidates, options, gradients=False)
    forward, backward = retrieval_passes(guide or student, guide or student, options, softmax=guide is None)
    target_weights = None if inputs.target_weights is None else inputs.target_weights.to(dtype)
    labels = candidates.all_gather(inputs.labels, candidates.source_counts)
    # Unlabelled pixels get a class of their own, in which no cycle is consistent.
    classes = torch.where(labels == options.ignore_index, unlabelled, labels)

    match = match_single_block if forward.kernels is None else match_blockwise
    # Where all candidates are local and no weight depends on other cycles, the pass over the tiles source → target that
    # finds the matches computes their softmax too; for that it matches back whatever a tile needs.
    fused = forward.kernels is None and candidates.ranks == 1 and guide is None and not options.class_balanced
    match_back, loss_sum = None, student[0].x.new_zeros(())

    # j*(i) = argmax_j D(i, j).
    if fused:
        matches, match_back, loss_sum = find_cycles_single_block(
            forward, backward, classes, inputs.target_classes, target_weights, options.num_classes
        )
        forward_matches = RowMatches(matches)
    else:
        forward_matches = match(forward, torch.arange(len(inputs.labels), device=labels.device))
        matches = candidates.all_gather(forward_matches.key_index, candidates.source_counts)
    # Each distinct j* once, on the rank that owns it.
    targets, histogram = _matched_targets(matches, classes, candidates, options)
    # i*(j) = argmax_i D(j, i).
    backward_matches = match(backward, targets) if match_back is None else RowMatches(match_back[targets])
    # y_i = y_i*: a cycle through j is consistent if its label is that of i*(j), and kept if the teacher sees that class
    # at j too. Where the teacher sees another, K + 1 is added to the label, so that one exchange has both.
    end_class = classes[backward_matches.key_index]
    target_class = code = end_class
    if inputs.target_classes is not None:
        agreed = inputs.target_classes[targets] == end_class
        target_class = torch.where(agreed, end_class, unlabelled)
        code = torch.where(agreed, end_class, end_class + unlabelled + 1)
    code_of_target = code.new_full((len(inputs.target),), unlabelled)
    code_of_target[targets] = code
    code_of_match = candidates.all_gather(code_of_target, candidates.target_counts)[matches]
    labelled = classes < unlabelled
    consistent = labelled & (classes == code_of_match % (unlabelled + 1))
    kept = labelled & (classes == code_of_match)

    # -log p(i -> j*) has weight w_i = w(j*), and -log p(j -> i*) the sum of w over all kept cycles through j.
    local = candidates.source_slice
    forward_weights, weights = kept[local].to(dtype), None
    backward_weights = histogram.gather(1, target_class[:, None])[:, 0].to(dtype)
    if target_weights is not None:
        weights = candidates.all_gather(target_weights, candidates.target_counts)[matches]
        forward_weights *= weights[local]
        backward_weights *= target_weights[targets]
    forward_rows, backward_rows = (x.nonzero()[:, 0] for x in (forward_weights, backward_weights))
    if fused:
        # The forward softmax is computed already.
        forward_rows = forward_rows[:0]
    positives = (
        Positives(
            forward_rows,
            forward_matches.select(forward_rows),
            classes[local][forward_rows],
            forward_weights[forward_rows],
        ),
        Positives(
            targets[backward_rows],
            backward_matches.select(backward_rows),
            target_class[backward_rows],
            backward_weights[backward_rows],
        ),
    )
    passes = (forward, backward) if guide is None else None
    key_pixels = guide if options.guide_keys and guide is not None else student
    contrast = partial(_contrast, inputs, options, student, key_pixels, passes, positives, loss_sum)
    return Cycles(matches, labels, consistent, kept, weights, contrast)


def _contrast(
    inputs: Inputs,
    options: Options,
    student: tuple[Pixels, Pixels],
    key_pixels: tuple[Pixels, Pixels],
    passes: tuple[RetrievalPass, RetrievalPass] | None,
    positives: tuple[Positives, Positives],
    loss_sum: torch.Tensor,
    class_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Contrast matches with all candidates (PLCA, equations 4 to 6): the loss and both gradients. Collective."""
    with torch.no_grad():
        passes = passes or retrieval_passes(student, key_pixels, options, softmax=True)
        backward = backward_single_block if passes[0].kernels is None else backward_blockwise
        # L = -sum_i w_i log p(i -> j*) - sum_j w_j log p(j -> i*).
        for retrieval, positive in zip(reversed(passes), reversed(positives), strict=True):
            weights = scale_by_class(positive.weights, positive.classes, class_scale)
            loss_sum = loss_sum + backward(retrieval, positive.rows, positive.matches, weights)
        for retrieval in passes:
            if retrieval.d_sigma is not None:
                add_gradient_through_sigma(retrieval)
    source, target = student
    if not source.gradients:
        return loss_sum
    total: torch.Tensor = _WithGradients.apply(
        inputs.source, inputs.target, loss_sum, source.gradient(), target.gradient()
    )
    return total


@torch.no_grad()
def find_matches(
    source: torch.Tensor, target: torch.Tensor, *, similarity: Similarity = "cosine", dtype: Precision = "fp32"
) -> Matches:
    """Match source pixels to target pixels and back (PLCA, equations 1 to 3), in memory linear in pixels.

    These are the matches that `cycle_association` finds for the same pixels on one rank; labels play no part in them.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] features, or class probabilities for `kl`.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        dtype: Type of matmul operands.
    """
    candidates = CandidateGroup("local", None, 0, 1, [len(source)], [len(target)])
    # The implementation whose keys are rounded like those of the loss.
    options = Options(num_classes=0, similarity=similarity, dtype=dtype, implementation="blockwise")
    with torch.autocast(source.device.type, enabled=False):
        pixels = _pixels(upcast(source), upcast(target), candidates, options, gradients=False)
        forward, backward = retrieval_passes(pixels, pixels, options, softmax=False)
        # j*(i) = argmax_j D(i, j), then i*(j) = argmax_i D(j, i) for each distinct j*.
        targets = match_single_block(forward, torch.arange(len(source), device=source.device)).key_index
        distinct, inverse = torch.unique(targets, return_inverse=True)
        return Matches(targets, match_single_block(backward, distinct).key_index[inverse])


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients with respect to two tensors are given."""

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


def _pixels(
    source: torch.Tensor, target: torch.Tensor, candidates: CandidateGroup, options: Options, *, gradients: bool
) -> tuple[Pixels, Pixels]:
    """Build the pixels of both domains from rows in fp32 or fp64."""
    # Unnormalised keys save a copy where tiles of whole rows are scaled after their matmul.
    unnormalised = (
        candidates.ranks == 1
        and options.similarity == "cosine"
        and options.dtype == "fp32"
        and options.implementation == "blockwise"
    )
    source_pixels, target_pixels = (
        Pixels(x.detach(), options.similarity, candidates, counts, unnormalised=unnormalised, gradients=gradients)
        for x, counts in ((source, candidates.source_counts), (target, candidates.target_counts))
    )
    return source_pixels, target_pixels


def _matched_targets(
    matches: torch.Tensor, classes: torch.Tensor, candidates: CandidateGroup, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the distinct matched targets of this rank, and the label histogram of the source pixels matching each.

    Args:
        matches: int64 [N_s], j* of all source pixels.
        classes: int64 [N_s], their classes.
        candidates: Ranks whose pixels are candidates.
        options: Options of the loss.

    Returns:
        Targets, int64 [k], and histogram, int64 [k, num_classes + 1], whose last column stays 0.
    """
    local = candidates.target_slice
    received = (matches >= local.start) & (matches < local.stop)
    targets, target_index = torch.unique(matches[received] - local.start, return_inverse=True)
    columns = options.num_classes + 1
    cells = target_index * columns + classes[received]
    histogram = torch.bincount(cells, minlength=len(targets) * columns).view(-1, columns)
    histogram[:, -1] = 0
    return targets, histogram
