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
    """Cycles of the n_s source pixels of one candidate set: one pair of images, or all images of a batch."""

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
    """Find the cycles of a batch at one level and judge them, for each candidate set (PLCA, equations 1 to 3).

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
    candidate_sets = []
    for place, labels in enumerate(inputs["labels"]):
        given = {name: values[place] for name, values in inputs.items()}
        # The teacher's pixels choose the matches where they are asked to.
        rows = given.get("source_guide", given["source"]), given.get("target_guide", given["target"])
        targets, ends = find_matches(*rows, similarity=SIMILARITY[level], dtype=config.dtype)
        seen = given["target_classes"][targets] if "target_classes" in given else None
        kept = are_consistent(labels, labels[ends], seen, IGNORE_INDEX)
        unknown = torch.full((len(given["target"]),), IGNORE_INDEX)
        candidate_sets.append(
            JudgedCycles(
                labels=labels.cpu(),
                targets=targets.cpu(),
                ends=ends.cpu(),
                target_labels=given.get("target_labels", unknown).cpu(),
                consistent=are_consistent(labels, labels[ends], None, IGNORE_INDEX).cpu(),
                kept=kept.cpu(),
                weights=(kept * given["target_weights"][targets] if "target_weights" in given else kept).cpu().double(),
                source_grid=_grid(source),
                target_grid=_grid(target),
            )
        )
    class_weights = None
    if config.class_weights and level == "predictions" and "features" in config.levels:
        # Cycles of features weigh the classes at both levels: these are their classes' shares of the loss.
        class_weights = _weight_by_class(judge(config, "features", source, target))
    return _shares_of_loss(config, candidate_sets, class_weights)


def _grid(domain: Domain) -> tuple[int, int]:
    height, width = domain.features.shape[-2:]
    return height, width


def _weight_by_class(candidate_sets: Sequence[JudgedCycles]) -> torch.Tensor:
    """Sum the weights of each class's cycles, fp64 [256]."""
    sums = torch.zeros(IGNORE_INDEX + 1, dtype=torch.float64)
    for cycles in candidate_sets:
        sums.index_add_(0, cycles.labels, cycles.weights)
    return sums


def _shares_of_loss(
    config: AssociationConfig, candidate_sets: Sequence[JudgedCycles], class_weights: torch.Tensor | None
) -> list[JudgedCycles]:
    """The loss is `sum_i w_i s_y(i) l_i / sum_i w_i s_y(i)`: turn weights w_i into these shares."""
    if config.class_balanced:
        sums = _weight_by_class(candidate_sets)
        if class_weights is None:
            pixels = torch.bincount(torch.cat([cycles.labels for cycles in candidate_sets]), minlength=len(sums))
            class_weights = sums / pixels if config.class_weights else torch.ones_like(sums)
        # s_c = r_c / sum of the class's weights.
        scale = torch.where(sums > 0, class_weights / sums, 0)
        candidate_sets = [cycles._replace(weights=cycles.weights * scale[cycles.labels]) for cycles in candidate_sets]
    total = sum(float(cycles.weights.sum()) for cycles in candidate_sets)
    return [cycles._replace(weights=cycles.weights / (total or 1.0)) for cycles in candidate_sets]
