"""The full objective: `L_ce + b1 L_lov + b2 (L_fass + L_cass) + b3 L_lsr` (PLCA, equation 10), and self-training."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_pca.association import Association
from dist_pca.association.candidates import phase
from dist_pca.config import Level, ObjectiveConfig
from dist_pca.distributed import world_size
from dist_pca.objective.class_statistics import ClassStatistics, class_contrast
from dist_pca.objective.cycle_association import associate_level, association_weight
from dist_pca.objective.dice import dice_loss
from dist_pca.objective.domains import IGNORE_INDEX, Domain
from dist_pca.objective.feature_distance import feature_distance
from dist_pca.objective.grid import labels_at, pixels_at
from dist_pca.objective.lovasz import lovasz_softmax
from dist_pca.objective.reduction import world_mean
from dist_pca.objective.self_training import pseudo_label_loss, world_confidence
from dist_pca.objective.smoothness import smoothness
from dist_pca.objective.source_contrast import source_contrast


def objective(
    config: ObjectiveConfig,
    source: Domain,
    target: Domain | None,
    mixed: Domain | None = None,
    masked: Domain | None = None,
    *,
    step: int,
    accumulation: int = 1,
    node: dist.ProcessGroup | None = None,
    things: Sequence[int] = (),
    statistics: ClassStatistics | None = None,
    class_weights: Sequence[float] | None = None,
    judge: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the loss of one micro-batch, and its terms for the log.

    Collective. Every term is a mean over all ranks' pixels, scaled so that the average of gradients over ranks is the
    gradient of one process on the concatenated micro-batch.

    Args:
        config: Weights and switches.
        source: Labelled domain.
        target: Unlabelled domain; None if no term uses the target's images themselves.
        mixed: Target images with pasted source classes, if self-training is on.
        masked: Target images with hidden blocks, if masked consistency is on.
        step: Optimiser step, for the association's start and ramp.
        accumulation: Micro-batches per update, for the released Lovasz convention and the bytes sent.
        node: Process group of this node's ranks, for the scope `node` of association and Lovasz.
        things: Train ids of the feature distance's classes.
        statistics: Moving class statistics, which are updated, if `class_statistics` is on.
        class_weights: Weight of each class in the cross-entropy; None weighs all pixels alike.
        judge: Judge matches without association, or before its start, too where target labels are known.
    """
    if source.labels is None:
        raise ValueError("the source has no labels")
    labels = source.labels.long()
    logits = source.logits.float()
    num_classes = logits.shape[1]
    full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    labelled = labels != IGNORE_INDEX
    weights = None if class_weights is None else full.new_tensor(class_weights)
    own = labelled if weights is None else weights[labels.clamp(max=num_classes - 1)] * labelled
    entropy = F.cross_entropy(full, labels, weight=weights, ignore_index=IGNORE_INDEX, reduction="sum")
    terms = {"ce": world_mean(entropy, own.sum())}
    loss = terms["ce"]

    if config.dice.weight > 0:
        terms["dice"] = dice_loss(full, labels)
        loss = loss + config.dice.weight * terms["dice"]

    if config.lovasz.weight > 0:
        terms["lovasz"] = lovasz_softmax(
            full.softmax(dim=1).permute(0, 2, 3, 1).flatten(0, 2),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            over_ranks=config.lovasz.scope != "rank",
            group=node if config.lovasz.scope == "node" else None,
            bins=config.lovasz.bins,
        )
        released = world_size() * accumulation if config.lovasz.convention == "released" else 1
        loss = loss + config.lovasz.weight * released * terms["lovasz"]

    if config.source_contrast.weight > 0:
        contrast = config.source_contrast
        classes = labels_at(
            source.labels, source.features.shape[-2:], num_classes, share=config.association.label_share
        )
        assert classes is not None
        terms["source_contrast"] = source_contrast(
            source.features.float(), classes, source.seeds, temperature=contrast.temperature, anchors=contrast.anchors
        )
        loss = loss + contrast.weight * terms["source_contrast"]

    if config.feature_distance.weight > 0:
        assert source.deepest is not None
        assert source.pretrained is not None
        classes = labels_at(source.labels, source.deepest.shape[-2:], num_classes, share=config.feature_distance.share)
        assert classes is not None
        terms["feature_distance"] = feature_distance(source.deepest.float(), source.pretrained, classes, things)
        loss = loss + config.feature_distance.weight * terms["feature_distance"]

    if config.adapt and target is not None:
        if config.smoothness.weight > 0:
            terms["smoothness_source"] = smoothness(logits, config.smoothness.threshold)
            terms["smoothness_target"] = smoothness(target.logits.float(), config.smoothness.threshold)
            loss = loss + config.smoothness.weight * (terms["smoothness_source"] + terms["smoothness_target"])
        if statistics is not None and step >= config.class_statistics.start_step:
            terms["class_statistics"] = _class_statistics(config, source, target, statistics)
            loss = loss + config.class_statistics.weight * terms["class_statistics"]
        weight = association_weight(config.association, step)
        if weight > 0 or (judge and target.labels is not None):
            kept_share = None
            # Features first: their cycles weigh the classes at both levels.
            for level in sorted(config.association.levels):
                with phase("association"), nullcontext() if weight > 0 else torch.no_grad():
                    found = associate_level(config.association, level, source, target, node, kept_share)
                kept_share = found.kept_share
                terms |= _judgement(level, target, found)
                if weight > 0:
                    loss = loss + weight * found.loss
                    terms |= {
                        f"association_{level}": found.loss,
                        f"kept_{level}": found.kept,
                        f"kept_per_class_{level}": found.kept_per_class,
                        f"cover_ratio_{level}": found.cover_ratio,
                        f"consistent_ratio_{level}": found.consistent_ratio,
                        f"kept_ratio_{level}": found.kept_ratio,
                        f"mutual_information_bound_{level}": found.mutual_information_bound,
                        # Bytes per update: the log averages over micro-batches.
                        f"communication_bytes_{level}": accumulation * found.communication_bytes,
                    }

    # Both views have the same target images and pseudo labels.
    taught = masked or mixed
    if taught is not None and step >= config.self_training.start_step:
        assert taught.confident is not None
        confidence = world_confidence(taught.confident)
        terms["confident_share"] = confidence.share
        terms["pseudo_label_accuracy"] = _pseudo_label_accuracy(taught)
        for name, weight, view in (
            ("self_training", config.self_training.weight, mixed),
            ("masked_consistency", config.masked_consistency.weight, masked),
        ):
            if view is not None:
                assert view.labels is not None
                terms[name] = pseudo_label_loss(view.logits, view.labels, confidence, view.trusted)
                loss = loss + weight * terms[name]
    return loss, {"loss": loss} | terms


def _class_statistics(
    config: ObjectiveConfig, source: Domain, target: Domain, statistics: ClassStatistics
) -> torch.Tensor:
    """Update the class statistics by the teacher's source features, and contrast both domains' pixels with them."""
    grid, num_classes = source.features.shape[-2:], source.logits.shape[1]
    labels = labels_at(source.labels, grid, num_classes, share=config.association.label_share)
    assert labels is not None
    assert source.teacher_features is not None
    assert target.teacher_logits is not None
    taught = pixels_at("features", source.teacher_features, source.logits, grid)
    options = config.class_statistics
    statistics.update(taught.flatten(0, 1), labels.flatten(), num_classes, decay=options.decay)
    of_target = pixels_at("predictions", target.features, target.teacher_logits, target.features.shape[-2:])
    confidence, classes = of_target.max(dim=2)
    classes = torch.where(confidence >= config.self_training.threshold, classes, IGNORE_INDEX)
    pixels = [
        pixels_at("features", x.features, x.logits, x.features.shape[-2:]).flatten(0, 1) for x in (source, target)
    ]
    return class_contrast(
        torch.cat(pixels),
        torch.cat([labels.flatten(), classes.flatten()]),
        statistics,
        temperature=options.temperature,
    )


def _judgement(level: Level, target: Domain, found: Association) -> dict[str, torch.Tensor]:
    """How many matches are correct, nan without target labels; with them the confusion matrices too."""
    ratios = {f"correct_ratio_{level}": found.correct_ratio, f"kept_correct_ratio_{level}": found.kept_correct_ratio}
    if target.labels is None:
        return ratios
    return ratios | {f"confusion_{level}": found.confusion, f"kept_confusion_{level}": found.kept_confusion}


def _pseudo_label_accuracy(view: Domain) -> torch.Tensor:
    """Share of pseudo labels that are correct; nan if true labels are not known."""
    assert view.labels is not None
    if view.truth is None:
        return view.logits.new_tensor(torch.nan)
    judged = (view.truth != IGNORE_INDEX) & (view.labels != IGNORE_INDEX)
    if view.trusted is not None:
        judged &= ~view.trusted
    return ((view.labels == view.truth) & judged).sum() / judged.sum()
