"""Cycle association of a micro-batch's images, according to the config (PLCA, section 3.1)."""

from typing import Any

import torch
import torch.distributed as dist

from dist_pca.association import Association, cycle_association, cycle_association_pairs, diffuse
from dist_pca.association.options import ClassWeights, Similarity
from dist_pca.association.sampling import class_balanced, random_grid
from dist_pca.config import AssociationConfig, Level
from dist_pca.errors import UserError
from dist_pca.objective.domains import IGNORE_INDEX, Domain
from dist_pca.objective.grid import labels_at, pixels_at

SIMILARITY: dict[Level, Similarity] = {"features": "cosine", "predictions": "kl"}


def association_weight(config: AssociationConfig, step: int) -> float:
    """Weight of the association term at a step: 0 before `start_step`, then linear over `ramp_steps`."""
    if step < config.start_step:
        return 0.0
    if config.ramp_steps == 0:
        return config.weight
    return config.weight * min(1.0, (step - config.start_step + 1) / config.ramp_steps)


def associate_level(
    config: AssociationConfig,
    level: Level,
    source: Domain,
    target: Domain,
    node: dist.ProcessGroup | None,
    kept_share: torch.Tensor | None = None,
) -> Association:
    """Associate source and target at one level (PLCA, section 3.1). Collective.

    Args:
        config: How pixels are associated.
        level: Features or predictions.
        source: Labelled domain.
        target: Unlabelled domain.
        node: Process group of this node's ranks, for the scope `node`.
        kept_share: Share of each class's cycles that are kept at the level of features, [K], which weighs the classes
            if `class_weights` asks for it. None takes this level's own.

    Raises:
        UserError: an input is wrong on some rank; the message names level, rank and tensor.
    """
    similarity = SIMILARITY[level]
    inputs = association_inputs(config, level, source, target)
    try:
        return _associate(config, similarity, inputs, source.logits.shape[1], node, kept_share)
    except ValueError as error:
        raise UserError(f"objective.association, {level}: {error}") from error


def association_inputs(
    config: AssociationConfig, level: Level, source: Domain, target: Domain
) -> dict[str, list[torch.Tensor]]:
    """Inputs of `cycle_association` at one level, by argument, as lists over images.

    The guide is given as `source_guide` and `target_guide`.
    """
    similarity = SIMILARITY[level]
    # Both levels are associated on one grid, that of the features (PLCA, section 3.1).
    grid = source.features.shape[-2:], target.features.shape[-2:]
    source_pixels = pixels_at(level, source.features, source.logits, grid[0])
    target_pixels = pixels_at(level, target.features, target.logits, grid[1])
    source_labels = labels_at(source.labels, grid[0], source.logits.shape[1], share=config.label_share)
    truth = labels_at(target.labels, grid[1], source.logits.shape[1])
    assert source_labels is not None
    if config.diffusion > 0:
        target_pixels = diffuse(target_pixels, config.diffusion, similarity, detach_statistics=config.detach_statistics)
    inputs: dict[str, Any] = {
        "source": list(source_pixels),
        "labels": list(source_labels),
        "target": list(target_pixels),
    }
    if truth is not None:
        inputs["target_labels"] = list(truth)
    if config.uses_teacher and target.teacher_logits is not None:
        inputs |= _teacher_inputs(config, level, source, target, grid)
    if config.pixel_budget is not None:
        source_picked = _picked(config, config.pixel_budget, source, grid[0], source_labels)
        target_picked = _picked(config, config.pixel_budget, target, grid[1], None)
        for name, images in inputs.items():
            picked = source_picked if name in ("source", "labels", "source_guide") else target_picked
            inputs[name] = [image[pixels] for image, pixels in zip(images, picked, strict=True)]
    return inputs


def _associate(
    config: AssociationConfig,
    similarity: Similarity,
    inputs: dict[str, Any],
    num_classes: int,
    node: dist.ProcessGroup | None,
    kept_share: torch.Tensor | None,
) -> Association:
    """Associate images in pairs, or all of them together; `inputs` are lists over images, by argument."""
    sources, targets, labels = (inputs.pop(name) for name in ("source", "target", "labels"))
    guide = None
    if "source_guide" in inputs:
        guide = inputs.pop("source_guide"), inputs.pop("target_guide")
    class_weights: ClassWeights = config.class_weights
    if class_weights == "kept_share" and kept_share is not None:
        class_weights = tuple(kept_share.tolist())
    options: Any = {
        "similarity": similarity,
        "num_classes": num_classes,
        "class_balanced": config.class_balanced,
        "class_weights": class_weights,
        "guide_keys": config.teacher_keys and guide is not None,
        "ignore_index": IGNORE_INDEX,
        "detach_statistics": config.detach_statistics,
        "implementation": config.implementation,
        "dtype": config.dtype,
        "deterministic": config.deterministic,
    }
    if config.scope == "pair":
        return cycle_association_pairs(sources, targets, labels, guide=guide, **inputs, **options)
    tensors: dict[str, Any] = {name: torch.cat(images) for name, images in inputs.items()}
    return cycle_association(
        torch.cat(sources),
        torch.cat(targets),
        torch.cat(labels),
        guide=None if guide is None else (torch.cat(guide[0]), torch.cat(guide[1])),
        group=node if config.scope == "node" else None,
        communication="local" if config.scope == "rank" else config.communication,
        comm_dtype=config.comm_dtype,
        **tensors,
        **options,
    )


def _teacher_inputs(
    config: AssociationConfig, level: Level, source: Domain, target: Domain, grid: tuple[torch.Size, torch.Size]
) -> dict[str, list[torch.Tensor]]:
    """Inputs from the teacher: classes and confidences of target pixels, and features that choose the matches."""
    assert target.teacher_logits is not None
    inputs = {}
    confidence, classes = pixels_at("predictions", target.features, target.teacher_logits, grid[1]).max(dim=2)
    if config.teacher_check:
        inputs["target_classes"] = list(torch.where(confidence >= config.teacher_threshold, classes, IGNORE_INDEX))
    if config.teacher_weight:
        inputs["target_weights"] = list(confidence)
    if config.teacher_matches:
        for name, domain, own_grid in (("source_guide", source, grid[0]), ("target_guide", target, grid[1])):
            assert domain.teacher_features is not None
            assert domain.teacher_logits is not None
            inputs[name] = list(pixels_at(level, domain.teacher_features, domain.teacher_logits, own_grid))
    return inputs


def _picked(
    config: AssociationConfig, budget: int, domain: Domain, grid: torch.Size, labels: torch.Tensor | None
) -> list[torch.Tensor]:
    """Sample the pixels of each image under a budget; balanced by class if there are labels."""
    if labels is not None and config.pixel_sampling == "balanced":
        return [
            class_balanced(label, budget, IGNORE_INDEX, seed) for label, seed in zip(labels, domain.seeds, strict=True)
        ]
    device = domain.logits.device
    return [random_grid(grid[0], grid[1], budget, seed).to(device) for seed in domain.seeds]
