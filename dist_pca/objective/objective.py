"""The full objective: `L_ce + b1 L_lov + b2 (L_fass + L_cass) + b3 L_lsr` (PLCA, equation 10)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_pca.association import Association, associate, associate_pairs, diffuse
from dist_pca.association.exchange import world_size
from dist_pca.association.phases import phase
from dist_pca.association.sampling import class_balanced, random_grid
from dist_pca.association.similarity import Similarity
from dist_pca.config import AssociationConfig, Level, ObjectiveConfig
from dist_pca.errors import UserError
from dist_pca.objective.lovasz import lovasz_softmax
from dist_pca.objective.reduction import world_mean
from dist_pca.objective.smoothness import smoothness

IGNORE_INDEX = 255
SIMILARITY: dict[Level, Similarity] = {"features": "cosine", "predictions": "kl"}


class Domain(NamedTuple):
    """What the network said of one domain's crops, and their labels."""

    logits: torch.Tensor
    """[B, K, h, w]"""
    features: torch.Tensor
    """[B, C, h', w']"""
    labels: torch.Tensor | None
    """Integer [B, H, W] at crop resolution, 255 ignored. The target's serve diagnosis alone."""
    seeds: Sequence[int] = ()
    """B seeds, one of each crop, for the positions that a budget picks."""


def objective(
    config: ObjectiveConfig,
    source: Domain,
    target: Domain | None,
    *,
    step: int,
    accumulation: int = 1,
    node: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro-batch and its terms for the log.

    Collective; every term is the mean over all ranks' pixels, scaled so that gradients averaged over ranks are those of
    one process on the concatenated micro-batch.

    Args:
        config: Weights and switches.
        source: Labelled domain.
        target: Unlabelled domain, None when training on the source alone.
        step: Update, for the association's start and ramp.
        accumulation: Micro-batches per update, for the released Lovasz convention and the bytes exchanged.
        node: This node's ranks, for the association scope `node`.
    """
    if source.labels is None:
        raise ValueError("the source has no labels")
    labels = source.labels.long()
    logits = source.logits.float()
    full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    labelled = (labels != IGNORE_INDEX).sum()
    terms = {"ce": world_mean(F.cross_entropy(full, labels, ignore_index=IGNORE_INDEX, reduction="sum"), labelled)}
    loss = terms["ce"]

    if config.lovasz.weight > 0:
        terms["lovasz"] = lovasz_softmax(
            full.softmax(dim=1).permute(0, 2, 3, 1).flatten(0, 2),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            over_world=config.lovasz.scope == "world",
        )
        released = world_size() * accumulation if config.lovasz.convention == "released" else 1
        loss = loss + config.lovasz.weight * released * terms["lovasz"]

    if config.adapt and target is not None:
        if config.smoothness.weight > 0:
            terms["smoothness_source"] = smoothness(logits, config.smoothness.threshold)
            terms["smoothness_target"] = smoothness(target.logits.float(), config.smoothness.threshold)
            loss = loss + config.smoothness.weight * (terms["smoothness_source"] + terms["smoothness_target"])
        weight = association_weight(config.association, step)
        if weight > 0:
            for level in config.association.levels:
                with phase("association"):
                    found = _associate_level(config.association, level, source, target, node)
                loss = loss + weight * found.loss
                terms |= {
                    f"association_{level}": found.loss,
                    f"kept_{level}": found.kept,
                    f"cover_ratio_{level}": found.cover_ratio,
                    f"consistent_ratio_{level}": found.consistent_ratio,
                    f"correct_ratio_{level}": found.correct_ratio,
                    f"nats_over_chance_{level}": found.nats_over_chance,
                    # Per update: the log takes the mean over micro-batches.
                    f"exchanged_bytes_{level}": accumulation * found.exchanged_bytes,
                    f"kept_per_class_{level}": found.kept_per_class,
                }
    return loss, {"loss": loss} | terms


def association_weight(config: AssociationConfig, step: int) -> float:
    """Weight of the association term at a step: 0 before `start_step`, then linear over `ramp_steps`."""
    if step < config.start_step:
        return 0.0
    if config.ramp_steps == 0:
        return config.weight
    return config.weight * min(1.0, (step - config.start_step + 1) / config.ramp_steps)


def _associate_level(
    config: AssociationConfig, level: Level, source: Domain, target: Domain, node: dist.ProcessGroup | None
) -> Association:
    similarity = SIMILARITY[level]
    source_rows, target_rows = (
        (domain.features.float() if level == "features" else domain.logits.float().softmax(dim=1)).flatten(2).mT
        for domain in (source, target)
    )
    source_grid, target_grid = (
        (domain.features if level == "features" else domain.logits).shape[-2:] for domain in (source, target)
    )
    source_labels, truth = labels_at(source.labels, source_grid), labels_at(target.labels, target_grid)
    assert source_labels is not None
    if config.diffusion > 0:
        target_rows = diffuse(target_rows, config.diffusion, similarity, detach_statistics=config.detach_statistics)
    source_pools, target_pools, label_pools = list(source_rows), list(target_rows), list(source_labels)
    truth_pools = None if truth is None else list(truth)
    if config.position_budget is not None:
        picked = _picked(config, config.position_budget, source, source_grid, source_labels)
        source_pools = [rows[at] for rows, at in zip(source_pools, picked, strict=True)]
        label_pools = [labels[at] for labels, at in zip(label_pools, picked, strict=True)]
        picked = _picked(config, config.position_budget, target, target_grid, None)
        target_pools = [rows[at] for rows, at in zip(target_pools, picked, strict=True)]
        if truth_pools is not None:
            truth_pools = [labels[at] for labels, at in zip(truth_pools, picked, strict=True)]
    try:
        if config.scope == "pair":
            return associate_pairs(
                source_pools,
                target_pools,
                label_pools,
                similarity=similarity,
                num_classes=source.logits.shape[1],
                target_labels=truth_pools,
                ignore_index=IGNORE_INDEX,
                detach_statistics=config.detach_statistics,
                implementation=config.implementation,
                dtype=config.dtype,
                deterministic=config.deterministic,
            )
        return associate(
            torch.cat(source_pools),
            torch.cat(target_pools),
            torch.cat(label_pools),
            similarity=similarity,
            num_classes=source.logits.shape[1],
            target_labels=None if truth_pools is None else torch.cat(truth_pools),
            group=node if config.scope == "node" else None,
            exchange="local" if config.scope == "rank" else config.exchange,
            ignore_index=IGNORE_INDEX,
            detach_statistics=config.detach_statistics,
            implementation=config.implementation,
            dtype=config.dtype,
            wire_dtype=config.wire_dtype,
            deterministic=config.deterministic,
        )
    except ValueError as error:
        raise UserError(f"objective.association, {level}: {error}") from error


def _picked(
    config: AssociationConfig, budget: int, domain: Domain, grid: torch.Size, labels: torch.Tensor | None
) -> list[torch.Tensor]:
    """Positions of each image that a budget leaves: balanced where there are labels to balance by."""
    if labels is not None and config.position_sampling == "balanced":
        return [
            class_balanced(label, budget, IGNORE_INDEX, seed) for label, seed in zip(labels, domain.seeds, strict=True)
        ]
    device = domain.logits.device
    return [random_grid(grid[0], grid[1], budget, seed).to(device) for seed in domain.seeds]


def labels_at(labels: torch.Tensor | None, grid: torch.Size) -> torch.Tensor | None:
    """Labels [B, H, W] at a grid's positions by nearest neighbour, int64 [B, h * w]."""
    if labels is None:
        return None
    return F.interpolate(labels[:, None].float(), size=grid, mode="nearest").flatten(1).long()
