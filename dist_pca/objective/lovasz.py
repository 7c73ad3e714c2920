"""Lovasz-Softmax (Berman, Rannen Triki and Blaschko, CVPR 2018): a convex surrogate of the mean IoU."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_pca.distributed import all_gather, all_reduce_sum, world_size

CPU_BLOCK_PIXELS, GPU_BLOCK_PIXELS = 2**15, 2**18
"""Pixels whose errors are put into bins at a time; a GPU makes the host wait for each block's counts."""


def lovasz_softmax(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = 255,
    over_ranks: bool = True,
    group: dist.ProcessGroup | None = None,
    bins: int | None = None,
) -> torch.Tensor:
    """Lovasz extension of the Jaccard loss, averaged over the classes that occur.

    Args:
        probabilities: Class probabilities of pixels, [P, K].
        labels: Labels of pixels, int64 [P].
        ignore_index: Label of pixels that are left out.
        over_ranks: Rank the errors of all ranks' pixels as one set (collective), as in the authors' released runs,
            instead of this rank's pixels. The average of gradients over ranks is then the gradient of one loss on all
            pixels.
        group: Ranks whose pixels are one set; None is the world. Over several groups, the average of gradients is that
            of the mean of their losses.
        bins: Number of bins in which errors are counted instead of sorted (see `binned_lovasz`), in memory and traffic
            that do not depend on the number of ranks; None sorts, with all pixels gathered on every rank.

    Returns:
        Scalar; 0, with a graph, if no pixel is labelled.
    """
    if bins is not None:
        return binned_lovasz(probabilities, labels, bins, ignore_index=ignore_index, over_ranks=over_ranks, group=group)
    labelled = labels != ignore_index
    probabilities, labels = probabilities[labelled], labels[labelled]
    ranks, rank = (world_size(group), dist.get_rank(group)) if over_ranks and world_size(group) > 1 else (1, 0)
    if over_ranks:
        probabilities, labels = all_gather(probabilities, group), all_gather(labels, group)
    present = torch.unique(labels)
    # If ranks have the same pixels, classes are divided among them; the average of their losses is the mean over all.
    own = present[rank::ranks]
    truth = (labels[:, None] == own).to(probabilities.dtype)
    errors, order = (truth - probabilities[:, own]).abs().sort(dim=0, descending=True)
    truth = truth.gather(0, order)
    # For each k, the Jaccard loss of a prediction that is wrong on the first k pixels; its increments weigh the errors.
    intersection = truth.sum(dim=0) - truth.cumsum(dim=0)
    union = truth.sum(dim=0) + (1 - truth).cumsum(dim=0)
    steps = torch.diff(1 - intersection / union, dim=0, prepend=torch.zeros_like(errors[:1]))
    loss: torch.Tensor = ranks * (errors * steps).sum() / max(1, len(present))
    # A rank without any class must still take part in the backward pass.
    return loss + 0 * probabilities.sum()


def binned_lovasz(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    bins: int,
    *,
    ignore_index: int = 255,
    over_ranks: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Lovasz-Softmax whose pixels are ordered by the bin of their error, with `bins` bins of equal width h = 1 / bins.

    Ranks add up two counts for each class and bin, those of the class's own pixels (foreground) and of all others
    (background), and each computes the loss and gradient of its own pixels from the sums. Arguments and result are
    those of `lovasz_softmax`.

    For one class, let P be its pixels, and let J(S) = 1 - (P - m) / (P + f) be the Jaccard loss of a prediction that is
    wrong on the set S, with m foreground and f background pixels. Its Lovasz extension is L(e) = max over g of <g, e>,
    where e are the errors and g ranges over the convex hull B of the increments of J along the orders of pixels; the
    order of falling errors attains it. Here g takes bins in falling order. Inside a bin it is the average of two kinds
    of orders, foreground first and background first, each averaged over all orders of its kind. From intersection I0
    and union U0 before a bin to I1 and U1 after it, foreground pixels have increments of 1 / U0 in the first kind and
    1 / U1 in the second, and background pixels have, on average, I1 / (U0 U1) and I0 / (U0 U1).

    The result is <g, e>, and it differs from L(e) by at most h:

    * g is an average of increments along orders, so it is in B, and <g, e> <= L(e).
    * Let e' be e with every error rounded down to the lower edge of its bin, e - h <= e' <= e. Where all errors of a
      bin are equal, any order inside it attains the maximum, so <g, e'> = L(e'). No increment is negative, and those of
      any order sum to J(all pixels) = 1. Hence <g, e> >= <g, e'> = L(e') >= L(e) - h.

    The same steps with e' = e show that the loss is exact, and its gradient g a subgradient, where all errors of each
    bin are equal. In general g is an h-subgradient: L(d) >= L(e) + <g, d - e> - h for any d.
    """
    loss: torch.Tensor = _BinnedLovasz.apply(probabilities, labels, bins, ignore_index, over_ranks, group)
    return loss


class _BinnedLovasz(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        probabilities: torch.Tensor,
        labels: torch.Tensor,
        bins: int,
        ignore_index: int,
        over_ranks: bool,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        classes = probabilities.shape[1]
        cells = 2 * classes * bins
        size = GPU_BLOCK_PIXELS if labels.is_cuda else CPU_BLOCK_PIXELS
        blocks = [slice(start, start + size) for start in range(0, len(labels), size)]
        # One more cell takes the pixels that are left out.
        counts = torch.zeros(cells + 1, dtype=torch.int64, device=labels.device)
        for block in blocks:
            # Nothing of a block is named here, where it would outlive it.
            counts += torch.bincount(
                _cells(probabilities[block], labels[block], bins, ignore_index)[2].flatten(), minlength=cells + 1
            )
        counts = counts[:-1].view(2, classes, bins)
        if over_ranks:
            counts = all_reduce_sum(counts, group)
        present = (counts[1].sum(dim=1) > 0).sum().clamp(min=1).double()
        scale = (world_size(group) if over_ranks else 1) / present
        increments = F.pad((scale * _increments(counts)).flatten(), (0, 1)).to(probabilities.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=labels.device)
        gradient = torch.empty_like(probabilities)
        for block in blocks:
            part, gradient[block] = _weigh(increments, *_cells(probabilities[block], labels[block], bins, ignore_index))
            loss += part
        ctx.save_for_backward(gradient)
        return loss.to(probabilities.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None


def _cells(
    probabilities: torch.Tensor, labels: torch.Tensor, bins: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of n pixels, whether a class is theirs, and the index into counts of [2, K, bins] and one more: [n, K]."""
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    truth = labels[:, None] == classes
    errors = torch.where(truth, 1 - probabilities, probabilities)
    cell = (errors * bins).long().clamp_(0, bins - 1)
    cell += bins * classes
    cell += truth * (len(classes) * bins)
    cell[labels == ignore_index] = 2 * len(classes) * bins
    return errors, truth, cell


def _weigh(
    increments: torch.Tensor, errors: torch.Tensor, truth: torch.Tensor, cell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of n pixels, fp64, and its gradient with respect to their probabilities, [n, K]."""
    weights = increments[cell]
    return (weights * errors).sum(dtype=torch.float64), torch.where(truth, -weights, weights)


def _increments(counts: torch.Tensor) -> torch.Tensor:
    """Increments of the Jaccard loss at the pixels of each kind, class and bin, fp64 [2, K, bins]; 0 without pixels."""
    background, foreground = counts.double()
    size = foreground.sum(dim=1, keepdim=True)
    # Sums over this bin and those of larger errors.
    missed, false = (kind.flip(1).cumsum(dim=1).flip(1) for kind in (foreground, background))
    intersection, union = size - missed, size + false
    intersection_before, union_before = intersection + foreground, union - background
    increments = torch.stack(
        [
            (intersection_before + intersection) / (2 * union_before * union),
            (1 / union_before + 1 / union) / 2,
        ]
    )
    return torch.where(size > 0, increments, 0.0)
