"""Cycles of a batch, one by one: what matches what, what is kept, and what the target's labels make of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dist_pca.association import find_matches
from dist_pca.association.method import are_consistent
from dist_pca.config import AssociationConfig, Level
from dist_pca.objective.cycle_association import SIMILARITY, association_inputs
from dist_pca.objective.domains import IGNORE_INDEX, Domain


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
        target: Labelled, or every match is without a true class.
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
        unknown = torch.full((len(pool["target"]),), IGNORE_INDEX)
        pools.append(
            JudgedCycles(
                labels=labels.cpu(),
                targets=targets.cpu(),
                ends=ends.cpu(),
                target_labels=pool.get("target_labels", unknown).cpu(),
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
