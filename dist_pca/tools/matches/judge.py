"""Cycles of a batch, judged by the true labels of the target pixels that they pass through."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dist_pca.association import find_matches
from dist_pca.association.method import are_consistent
from dist_pca.config import AssociationConfig, Level
from dist_pca.objective.cycle_association import SIMILARITY, association_inputs
from dist_pca.objective.domains import IGNORE_INDEX, Domain

HUB_SHARE = 0.01
"""Share of the target's pixels, those with the most matches, that are called hubs."""


class JudgedCycles(NamedTuple):
    """Cycles of the n_s source pixels of one pool of candidates: one pair of images, or all images of a batch."""

    labels: torch.Tensor
    """int64 [n_s], class of each source pixel, 255 where it has none."""
    targets: torch.Tensor
    """int64 [n_s], matched target pixel j*."""
    ends: torch.Tensor
    """int64 [n_s], source pixel i* that this one matches."""
    target_labels: torch.Tensor
    """int64 [n_t], true class of every target pixel, 255 where it has none."""
    consistent: torch.Tensor
    """bool [n_s], whether i* has the class of the source pixel."""
    kept: torch.Tensor
    """bool [n_s], whether it is consistent and the teacher, where it is asked, sees that class at j* too."""
    weights: torch.Tensor
    """fp64 [n_s], share of the batch's association loss; 0 where the cycle is not kept."""
    source_grid: tuple[int, int]
    """Rows and columns of an image's source pixels."""
    target_grid: tuple[int, int]
    """Rows and columns of an image's target pixels."""

    @property
    def truth(self) -> torch.Tensor:
        """True class of each matched target pixel, int64 [n_s], 255 where it has none."""
        return self.target_labels[self.targets]

    @property
    def correct(self) -> torch.Tensor:
        """Whether the matched target pixel truly has the source pixel's class, bool [n_s]."""
        return (self.labels == self.truth) & (self.labels != IGNORE_INDEX)


def judge(config: AssociationConfig, level: Level, source: Domain, target: Domain) -> list[JudgedCycles]:
    """Find the cycles of a batch at one level and judge them, pool by pool (PLCA, equations 1 to 3).

    The target's labels judge alone: no match, no cycle and no weight depends on them.

    Args:
        config: How pixels are associated; `pair` associates image by image, every other scope all of them together.
        level: Features or predictions.
        source: Labelled.
        target: Labelled.
    """
    inputs = association_inputs(config, level, source, target)
    if config.scope != "pair":
        inputs = {name: [torch.cat(images)] for name, images in inputs.items()}
    pools = []
    for place, labels in enumerate(inputs["labels"]):
        pool = {name: pools_of[place] for name, pools_of in inputs.items()}
        # The teacher's pixels choose the matches where they are asked to.
        rows = pool.get("source_guide", pool["source"]), pool.get("target_guide", pool["target"])
        targets, ends = find_matches(*rows, similarity=SIMILARITY[level], dtype=config.dtype)
        seen = pool["target_classes"][targets] if "target_classes" in pool else None
        kept = are_consistent(labels, labels[ends], seen, IGNORE_INDEX)
        pools.append(
            JudgedCycles(
                labels=labels.cpu(),
                targets=targets.cpu(),
                ends=ends.cpu(),
                target_labels=pool["target_labels"].cpu(),
                consistent=are_consistent(labels, labels[ends], None, IGNORE_INDEX).cpu(),
                kept=kept.cpu(),
                weights=(kept * pool["target_weights"][targets] if "target_weights" in pool else kept).cpu().double(),
                source_grid=_grid(source),
                target_grid=_grid(target),
            )
        )
    return _shares_of_loss(pools, class_balanced=config.class_balanced)


def _grid(domain: Domain) -> tuple[int, int]:
    height, width = domain.features.shape[-2:]
    return height, width


def _shares_of_loss(pools: Sequence[JudgedCycles], *, class_balanced: bool) -> list[JudgedCycles]:
    """The loss is `sum_i w_i s_y(i) l_i / sum_i w_i s_y(i)`: turn weights w_i into these shares."""
    if class_balanced:
        sums = torch.zeros(IGNORE_INDEX + 1, dtype=torch.float64)
        for pool in pools:
            sums.index_add_(0, pool.labels, pool.weights)
        # Each class that has a weight weighs as much as any other.
        pools = [pool._replace(weights=torch.nan_to_num(pool.weights / sums[pool.labels])) for pool in pools]
    total = sum(float(pool.weights.sum()) for pool in pools)
    return [pool._replace(weights=pool.weights / (total or 1.0)) for pool in pools]


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
    """Add up the cycles of batches, each a sequence of pools."""
    pools = [pool for batch in batches for pool in batch]
    labels, truth, kept, consistent = (
        torch.cat([getattr(pool, name) for pool in pools]) for name in ("labels", "truth", "kept", "consistent")
    )
    labelled = labels != IGNORE_INDEX
    columns = num_classes + 1
    cells = labels * columns + torch.where(truth == IGNORE_INDEX, num_classes, truth)
    weights = torch.cat([pool.weights for pool in pools])

    def matrix(chosen: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        return torch.bincount(cells[chosen], values, minlength=num_classes * columns).view(num_classes, columns)

    received = torch.cat(
        [torch.bincount(p.targets[p.labels != IGNORE_INDEX], minlength=len(p.target_labels)) for p in pools]
    )
    covered = sum(int((torch.bincount(pool.targets) > 0).sum()) for pool in pools)
    edge = torch.cat([_at_edge(pool) for pool in pools])
    hubs = received.topk(math.ceil(HUB_SHARE * len(received))).indices
    hub_truth = torch.cat([pool.target_labels for pool in pools])[hubs]
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


def _at_edge(pool: JudgedCycles) -> torch.Tensor:
    """Whether each target pixel lies in the outermost ring of its image, bool [n_t]."""
    edge = torch.ones(pool.target_grid, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten().repeat(len(pool.target_labels) // edge.numel())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
