"""Cycle statistics, summed over candidate sets and ranks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dist_pca.association.candidates import CandidateGroup
from dist_pca.association.method import Cycles
from dist_pca.association.options import Inputs, Options
from dist_pca.distributed import all_reduce_sum


class Counts(NamedTuple):
    """Counts of this rank's source pixels, and of the matches of its target pixels; all fp64."""

    labelled: torch.Tensor
    """Labelled source pixels."""
    targets: torch.Tensor
    """Target pixels."""
    covered: torch.Tensor
    """Target pixels matched by at least one source pixel."""
    kept: torch.Tensor
    """[K], consistent cycles by class."""
    weight: torch.Tensor
    """[K], their summed weight."""
    uniform_loss: torch.Tensor
    """[K], that weight times the loss of uniform probabilities in both directions, `ln N_s + ln N_t` [nats]."""
    confusion: torch.Tensor
    """[2, K, K], of all matches and of those on consistent cycles: class of the source pixel, then true class of the
    target pixel. [0, K, K] where no rank has target labels."""


def count(inputs: Inputs, cycles: Cycles, candidates: CandidateGroup, options: Options, *, confusion: bool) -> Counts:
    """Count the cycles of one candidate set on this rank.

    Args:
        inputs: Pixels of this rank.
        cycles: Cycles of all source pixels.
        candidates: Ranks whose pixels are candidates.
        options: Options of the loss.
        confusion: Whether any rank has target labels.
    """
    classes = options.num_classes
    consistent = cycles.consistent[candidates.source_slice]
    kept_labels = inputs.labels[consistent]
    kept = torch.bincount(kept_labels, minlength=classes).double()
    weight = kept
    if cycles.weights is not None:
        # Unlike bincount, this adds weights in one order on every device.
        weight = torch.zeros_like(kept)
        kept_weights = cycles.weights[candidates.source_slice][consistent]
        weight.index_put_((kept_labels,), kept_weights.double(), accumulate=True)

    first, targets = candidates.target_slice.start, len(inputs.target)
    received = (cycles.matches >= first) & (cycles.matches < first + targets)
    target_index = cycles.matches[received] - first
    covered = torch.zeros(targets, dtype=torch.bool, device=target_index.device)
    covered[target_index] = True
    matrices = kept.new_zeros((2 if confusion else 0, classes, classes))
    if inputs.target_labels is not None:
        labels, truth = cycles.labels[received], inputs.target_labels[target_index]
        known = (labels != options.ignore_index) & (truth != options.ignore_index)
        for matrix, chosen in zip(matrices, (known, known & cycles.consistent[received]), strict=True):
            cells = labels[chosen] * classes + truth[chosen]
            matrix += torch.bincount(cells, minlength=classes * classes).view(classes, classes)
    return Counts(
        (inputs.labels != options.ignore_index).sum().double(),
        kept.new_tensor(targets),
        covered.sum().double(),
        kept,
        weight,
        weight * math.log(sum(candidates.source_counts) * sum(candidates.target_counts)),
        matrices,
    )


def total(counts: Sequence[Counts]) -> Counts:
    """Sum counts over candidate sets and over the ranks of the world. Collective."""
    sums = [torch.stack(field).sum(dim=0) for field in zip(*counts, strict=True)]
    flat = all_reduce_sum(torch.cat([x.flatten() for x in sums]))
    parts = torch.split(flat, [x.numel() for x in sums])
    return Counts(*(part.view(x.shape) for part, x in zip(parts, sums, strict=True)))


def correct_ratio(confusion: torch.Tensor) -> torch.Tensor:
    """Compute the share of the diagonal of a [K, K] matrix; nan if it is empty."""
    return confusion.trace() / confusion.sum()
