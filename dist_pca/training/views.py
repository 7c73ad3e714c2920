"""Views of a micro-batch that the student is trained on, with pseudo labels of the teacher."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from dist_pca.config import RunConfig
from dist_pca.data.collate import Batch
from dist_pca.data.randomness import Domain as DomainName
from dist_pca.data.randomness import Purpose, draw
from dist_pca.data.views import block_mask, class_mask, photometric_view
from dist_pca.model.segmenter import Output
from dist_pca.objective import Domain, Domains
from dist_pca.objective.cycle_association import association_weight
from dist_pca.objective.self_training import pseudo_labels

Network = Callable[[torch.Tensor], Output]


class View(NamedTuple):
    """Images of one domain."""

    images: torch.Tensor
    """[B, C, H, W], uint8 or floating point in 0..1."""
    to_domain: Callable[..., Domain]
    """Combines the network's logits, features and deepest map with labels and other known values to a `Domain`."""


class Views(NamedTuple):
    """All views of a micro-batch."""

    source: View
    target: View | None = None
    mixed: View | None = None
    masked: View | None = None


def student_views(
    config: RunConfig,
    source: Batch,
    target: Batch | None,
    network: Network,
    as_teacher: Callable[[], AbstractContextManager[None]],
    pretrained: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    mean: torch.Tensor,
    step: int,
) -> Views:
    """Label the target's clean images with the teacher, then augment, mix and mask them for the student.

    Collective where a term needs the teacher. Everything random is a function of the seed and sample indices. Before
    the first step of a term, its teacher pass and its views are left out.

    Args:
        config: The run.
        source: Labelled crops.
        target: Unlabelled crops; None if the run trains on the source alone.
        network: Returns logits and features for images.
        as_teacher: Returns a context in which `network` is the teacher.
        pretrained: Returns the frozen backbone's deepest map of the source view, if the feature distance needs it.
        mean: Mean that the network subtracts from images, [C, 1, 1] in 0..1.
        step: Step, from 0.
    """
    objective = config.objective
    association, self_training = objective.association, objective.self_training
    associates = association.uses_teacher and association_weight(association, step) > 0
    contrasts = objective.uses_statistics and step >= objective.class_statistics.start_step
    labels_target = objective.trains_on_pseudo_labels and step >= self_training.start_step
    change = partial(photometric_view, config=config.data.photometric, seed=config.seed)
    source_images = change(source.images, source.indices, domain="source")
    source_view = partial(Domain, labels=source.labels, seeds=_seeds(source, config.seed, "source"))
    if pretrained is not None:
        source_view = partial(source_view, pretrained=pretrained(source_images))
    if target is None:
        return Views(View(source_images, source_view))
    target_view = partial(Domain, labels=target.labels, seeds=_seeds(target, config.seed, "target"))
    # Even if no loss term needs it, the target's pass updates running statistics.
    uses_target = objective.shows_target or config.model.running_statistics == "target"
    masks_target = labels_target and objective.masked_consistency.weight > 0
    target_images = (
        change(target.images, target.indices, domain="target") if uses_target or masks_target else target.images
    )
    mixed = masked = None
    if associates or contrasts or labels_target:
        with as_teacher():
            of_target = network(target.images)
            of_source = network(source.images) if contrasts or (associates and association.teacher_matches) else None
        if associates or contrasts:
            target_view = partial(target_view, teacher_logits=of_target.logits, teacher_features=of_target.features)
        if of_source is not None:
            source_view = partial(source_view, teacher_logits=of_source.logits, teacher_features=of_source.features)
    if labels_target:
        labels, confident = pseudo_labels(
            of_target.logits,
            target.images.shape[-2:],
            threshold=self_training.threshold,
            ignore_top=self_training.ignore_top,
            ignore_bottom=self_training.ignore_bottom,
            ignore_sides=self_training.ignore_sides,
            beside=target.beside,
        )
        labelled = partial(Domain, confident=confident, truth=target.labels)
        if self_training.weight > 0:
            assert source.labels is not None
            pasted = class_mask(source.labels, target.indices, seed=config.seed)
            images = torch.where(pasted[:, None], source.images, target.images)
            mixed = View(
                change(images, target.indices, domain="target"),
                partial(labelled, labels=torch.where(pasted, source.labels.long(), labels), trusted=pasted),
            )
        if masks_target:
            visible = block_mask(
                target.images,
                target.indices,
                seed=config.seed,
                block=objective.masked_consistency.block,
                ratio=objective.masked_consistency.ratio,
            )
            # Hidden pixels are 0 after the network has normalised them, as in MIC; black would shift batch norm.
            masked = View(torch.where(visible, _unit(target_images), mean), partial(labelled, labels=labels))
    return Views(
        View(source_images, source_view), View(target_images, target_view) if uses_target else None, mixed, masked
    )


def forward_views(
    network: Network,
    views: Views,
    *,
    joint: bool,
    keep_statistics: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Domains:
    """Run the network on all views.

    Args:
        network: Returns logits and features for images.
        views: Source view, and further ones.
        joint: Concatenate all views to one batch, rather than pass one after the other.
        keep_statistics: Returns a context in which batch norm's running statistics are not updated; for all separate
            passes but that of the view with most of the target.
    """
    present = [view for view in views if view is not None]
    tracked = views.target or views.mixed or views.masked or views.source
    if joint and len(present) > 1:
        sizes = [len(view.images) for view in present]
        # Images without photometric augmentation are still uint8; others are floating point.
        all_uint8 = all(view.images.dtype == torch.uint8 for view in present)
        images = [view.images if all_uint8 else _unit(view.images) for view in present]
        outputs = _split(network(torch.cat(images)), sizes)
    else:
        outputs = []
        for view in present:
            with nullcontext() if view is tracked else keep_statistics():
                outputs.append(network(view.images))
    # The feature distance uses the source alone.
    outputs[1:] = [output._replace(deepest=None) for output in outputs[1:]]
    domains = iter(
        view.to_domain(output.logits, output.features, deepest=output.deepest)
        for view, output in zip(present, outputs, strict=True)
    )
    return Domains(*(None if view is None else next(domains) for view in views))  # type: ignore[arg-type]


def _split(output: Output, sizes: list[int]) -> list[Output]:
    parts = [[None] * len(sizes) if values is None else torch.split(values, sizes) for values in output]
    return [Output(*part) for part in zip(*parts, strict=True)]


def _unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _seeds(batch: Batch, seed: int, domain: DomainName) -> list[int]:
    # A function of each crop's sample index, so that the same pixels are selected on any number of ranks.
    return [int(draw(1, seed, domain, Purpose.PIXELS, index)[0] >> 1) for index in batch.indices]
