"""What the matches of batches came to, judged by the true labels of the target pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_pca.classes import IGNORE_INDEX
from dist_pca.evaluation.cycles import JudgedCycles

HUB_SHARE = 0.01
"""Share of the target's pixels, those with the most matches, that are called hubs."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What the matches of several batches came to. The last column of each matrix is pixels without a true class."""

    matches: torch.Tensor
    """int64 [K, K + 1], by class of the source pixel and true class of the matched target pixel."""
    kept: torch.Tensor
    """int64 [K, K + 1], those of kept cycles."""
    weight: torch.Tensor
    """fp64 [K, K + 1], share of the association loss that they carry, mean over batches with a kept cycle."""
    consistent_ratio: float
    """Share of labelled source pixels whose cycle is consistent, before any teacher's check."""
    cover_ratio: float
    """Share of target pixels that some source pixel matched."""
    hub_share: float
    """Share of the labelled source pixels' matches that the most matched 1 per cent of target pixels receive."""
    hub_classes: torch.Tensor
    """fp64 [K + 1], share of these matches by true class of the target pixel."""
    edge_share: float
    """Share of the matches that pixels at the edge of a target image receive; a convolution's padding shows there."""
    edge_pixels: float
    """Share of target pixels that lie at an edge."""

    @property
    def correct_ratio(self) -> float:
        """Share of matches whose target pixel truly has the source's class, where it has one; else nan."""
        return correct_ratio(self.matches)

    @property
    def kept_correct_ratio(self) -> float:
        """Share of kept cycles whose target pixel truly has the source's class, where it has one; else nan."""
        return correct_ratio(self.kept)


def correct_ratio(confusion: torch.Tensor) -> float:
    """Share of the diagonal of a matrix [K, K + 1] without its last column; nan where there is nothing."""
    known = float(confusion[:, :-1].sum())
    return float(confusion.diagonal().sum()) / known if known else math.nan


def summarise(batches: Sequence[Sequence[JudgedCycles]], num_classes: int) -> Summary:
    """Add up the cycles of batches, each a sequence of candidate sets."""
    candidate_sets = [cycles for batch in batches for cycles in batch]
    labels, truth, kept, consistent = (
        torch.cat([getattr(cycles, name) for cycles in candidate_sets])
        for name in ("labels", "truth", "kept", "consistent")
    )
    labelled = labels != IGNORE_INDEX
    columns = num_classes + 1
    cells = labels * columns + torch.where(truth == IGNORE_INDEX, num_classes, truth)
    weights = torch.cat([cycles.weights for cycles in candidate_sets])

    def matrix(chosen: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        return torch.bincount(cells[chosen], values, minlength=num_classes * columns).view(num_classes, columns)

    received = torch.cat(
        [torch.bincount(p.targets[p.labels != IGNORE_INDEX], minlength=len(p.target_labels)) for p in candidate_sets]
    )
    covered = sum(int((torch.bincount(cycles.targets) > 0).sum()) for cycles in candidate_sets)
    edge = torch.cat([_at_edge(cycles) for cycles in candidate_sets])
    hubs = received.topk(math.ceil(HUB_SHARE * len(received))).indices
    hub_truth = torch.cat([cycles.target_labels for cycles in candidate_sets])[hubs]
    hub_matches = torch.bincount(
        torch.where(hub_truth == IGNORE_INDEX, num_classes, hub_truth),
        received[hubs].double(),
        minlength=columns,
    )
    # Without a kept cycle bincount gives integers.
    weight = matrix(kept, weights[kept]).double()
    return Summary(
        matches=matrix(labelled),
        kept=matrix(kept),
        weight=weight / max(float(weight.sum()), torch.finfo(weight.dtype).tiny),
        consistent_ratio=_ratio(float(consistent.sum()), float(labelled.sum())),
        cover_ratio=covered / len(received),
        hub_share=_ratio(float(hub_matches.sum()), float(received.sum())),
        hub_classes=hub_matches / max(float(hub_matches.sum()), 1.0),
        edge_share=_ratio(float(received[edge].sum()), float(received.sum())),
        edge_pixels=float(edge.double().mean()),
    )


def _at_edge(cycles: JudgedCycles) -> torch.Tensor:
    """Whether each target pixel lies in the outermost ring of its image, bool [n_t]."""
    edge = torch.ones(cycles.target_grid, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten().repeat(len(cycles.target_labels) // edge.numel())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
