"""What the cycles did, in sums over pools and ranks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dist_pca.association.cycles import Cycles
from dist_pca.association.exchange import all_reduce_sum
from dist_pca.association.options import Inputs, Options
from dist_pca.association.pool import Pool


class Counts(NamedTuple):
    """A rank's share: its own source pixels, and the matches that its own target pixels received. All fp64."""

    labelled: torch.Tensor
    """Labelled source pixels."""
    targets: torch.Tensor
    """Target pixels."""
    covered: torch.Tensor
    """Target pixels that some source pixel matched."""
    kept: torch.Tensor
    """[K], consistent cycles by class."""
    weight: torch.Tensor
    """[K], their summed weight."""
    chance: torch.Tensor
    """[K], that weight times minus the log-probability of a uniform choice in both directions, `ln N_s + ln N_t`."""
    confusion: torch.Tensor
    """[2, K, K], of all matches and of those on consistent cycles: class of the source pixel, then true class of the
    target pixel. [0, K, K] where no rank knows the latter."""


def count(inputs: Inputs, cycles: Cycles, pool: Pool, options: Options, *, confusion: bool) -> Counts:
    """Count on this rank; `confusion` where any rank has target labels."""
    first, classes = sum(pool.source_counts[: pool.rank]), options.num_classes
    own = slice(first, first + len(inputs.labels))
    consistent = cycles.consistent[own]
    kept_labels = inputs.labels[consistent]
    kept = torch.bincount(kept_labels, minlength=classes).double()
    weight = kept
    if cycles.weights is not None:
        # Unlike bincount, this adds weights in one order on every device.
        weight = torch.zeros_like(kept)
        weight.index_put_((kept_labels,), cycles.weights[own][consistent].double(), accumulate=True)

    first, targets = sum(pool.target_counts[: pool.rank]), len(inputs.target)
    received = (cycles.matches >= first) & (cycles.matches < first + targets)
    place = cycles.matches[received] - first
    covered = torch.zeros(targets, dtype=torch.bool, device=place.device)
    covered[place] = True
    table = kept.new_zeros((2 if confusion else 0, classes, classes))
    if inputs.target_labels is not None:
        labels, truth = cycles.labels[received], inputs.target_labels[place]
        comparable = (labels != options.ignore_index) & (truth != options.ignore_index)
        for matrix, chosen in zip(table, (comparable, comparable & cycles.consistent[received]), strict=True):
            cells = labels[chosen] * classes + truth[chosen]
            matrix += torch.bincount(cells, minlength=classes * classes).view(classes, classes)
    return Counts(
        (inputs.labels != options.ignore_index).sum().double(),
        kept.new_tensor(targets),
        covered.sum().double(),
        kept,
        weight,
        weight * math.log(sum(pool.source_counts) * sum(pool.target_counts)),
        table,
    )


def total(counts: Sequence[Counts]) -> Counts:
    """Sum over pools and over the ranks of the world. Collective."""
    sums = [torch.stack(field).sum(dim=0) for field in zip(*counts, strict=True)]
    flat = all_reduce_sum(torch.cat([x.flatten() for x in sums]))
    parts = torch.split(flat, [x.numel() for x in sums])
    return Counts(*(part.view(x.shape) for part, x in zip(parts, sums, strict=True)))


def correct_ratio(confusion: torch.Tensor) -> torch.Tensor:
    """Share of the diagonal, of [K, K]; nan where there is nothing."""
    return confusion.trace() / confusion.sum()
