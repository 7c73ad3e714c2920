"""The result of the cycle association loss, and the cycle statistics in it, summed over candidate sets and ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dist_pca.association.candidates import CandidateGroup
from dist_pca.association.method import Cycles
from dist_pca.association.options import Inputs, Options
from dist_pca.distributed import all_reduce_sum


@dataclass(frozen=True)
class Association:
    """Loss and cycle diagnostics; counts and ratios are over all ranks."""

    loss: torch.Tensor
    """Scalar with a graph on every rank, 0 where no rank keeps a cycle of positive weight. Averaged over ranks, its
    gradients and its value are those of `-sum_i w_i [log p(i -> j*) + log p(j* -> i*)] / sum_i w_i` over the kept
    cycles of all ranks (PLCA, section 3.1). Class-balanced, it is the mean over classes of that mean within each,
    weighted by `class_weights`."""
    kept: torch.Tensor
    """int64, number of kept cycles: they are consistent, and the teacher, if it checks, agrees at the match."""
    cover_ratio: torch.Tensor
    """Share of target pixels matched by at least one source pixel."""
    consistent_ratio: torch.Tensor
    """Share of labelled source pixels whose cycle is consistent, whatever the teacher sees."""
    kept_ratio: torch.Tensor
    """Share of labelled source pixels whose cycle is kept."""
    correct_ratio: torch.Tensor
    """Share of matches whose target pixel truly has the source pixel's class; nan without target labels."""
    kept_correct_ratio: torch.Tensor
    """Share of kept cycles whose target pixel truly has the source pixel's class; nan without target labels."""
    kept_per_class: torch.Tensor
    """int64 [num_classes], kept cycles by class."""
    kept_share: torch.Tensor
    """fp64 [num_classes], summed weight of each class's kept cycles over its number of labelled source pixels, which is
    the share whose cycle is kept if all weights are 1; 0 where there are none."""
    confusion: torch.Tensor
    """int64 [num_classes, num_classes], matches by class of the source pixel (rows) and true class of the matched
    target pixel (columns), where both are known; zeros without target labels."""
    kept_confusion: torch.Tensor
    """int64 [num_classes, num_classes], `confusion` of the kept cycles alone."""
    mutual_information_bound: torch.Tensor
    """InfoNCE lower bound on mutual information, `ln N_s + ln N_t - loss` [nats], both directions together. Over
    several candidate sets `ln N_s + ln N_t` is averaged with the loss's weights; nan where no cycle has weight."""
    communication_bytes: torch.Tensor
    """int64, bytes of keys, matches and gradients sent by each rank to others, mean over ranks."""

    @property
    def nats_over_chance(self) -> torch.Tensor:
        """Old name of `mutual_information_bound`, until 0.3."""
        return self.mutual_information_bound

    @property
    def exchanged_bytes(self) -> torch.Tensor:
        """Old name of `communication_bytes`, until 0.3."""
        return self.communication_bytes


class Counts(NamedTuple):
    """Counts of this rank's source pixels, and of the matches of its target pixels; all fp64."""

    labelled: torch.Tensor
    """[K], labelled source pixels by class."""
    targets: torch.Tensor
    """Target pixels."""
    covered: torch.Tensor
    """Target pixels matched by at least one source pixel."""
    consistent: torch.Tensor
    """Consistent cycles."""
    kept: torch.Tensor
    """[K], kept cycles by class."""
    weight: torch.Tensor
    """[K], their summed weight."""
    uniform_loss: torch.Tensor
    """[K], that weight times the loss of uniform probabilities in both directions, `ln N_s + ln N_t` [nats]."""
    confusion: torch.Tensor
    """[2, K, K], of all matches and of those on kept cycles: class of the source pixel, then true class of the
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
    own = candidates.source_slice
    kept_labels = inputs.labels[cycles.kept[own]]
    kept = torch.bincount(kept_labels, minlength=classes).double()
    weight = kept
    if cycles.weights is not None:
        # Unlike bincount, this adds weights in one order on every device.
        weight = torch.zeros_like(kept)
        kept_weights = cycles.weights[own][cycles.kept[own]]
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
        for matrix, chosen in zip(matrices, (known, known & cycles.kept[received]), strict=True):
            cells = labels[chosen] * classes + truth[chosen]
            matrix += torch.bincount(cells, minlength=classes * classes).view(classes, classes)
    return Counts(
        torch.bincount(inputs.labels[inputs.labels != options.ignore_index], minlength=classes).double(),
        kept.new_tensor(targets),
        covered.sum().double(),
        cycles.consistent[own].sum().double(),
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
