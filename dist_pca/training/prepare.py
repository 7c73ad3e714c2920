"""Checks that need no process group, and what they have opened and built by the end."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dist_pca.classes import ClassInfo, label_set_members
from dist_pca.config import RunConfig
from dist_pca.data.augment import check_crop
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.class_sampling import count_classes
from dist_pca.data.class_table import class_table, describe_missing, lookup_table, missing_classes
from dist_pca.data.collate import common_bands
from dist_pca.data.source import build_sampler, micro_batch_size
from dist_pca.errors import UserError
from dist_pca.model.backbone import check_size
from dist_pca.model.segmenter import Segmenter, backbone_options, build_segmenter, fit_to_crop
from dist_pca.objective.class_weights import class_weights
from dist_pca.objective.feature_distance import thing_classes
from dist_pca.shards.manifest import Manifest, describe_empty_classes
from dist_pca.training.accumulation import fit_accumulation, fit_batches
from dist_pca.training.checkpoint import latest_checkpoint
from dist_pca.training.deepspeed_config import reconcile_launcher
from dist_pca.training.initialise import initialise
from dist_pca.training.limits import check_room, shared_memory_bytes
from dist_pca.training.loggers import check_trackers
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.run_folder import RunData, check_resume

_log = logging.getLogger("dist_pca.training")
_SIZES_CHECKED = 16
"""Sizes of validation images that are passed through the backbone before training, out of all that there are."""


class PreparedRun(NamedTuple):
    """A checked run: its config, shards, classes and network."""

    config: RunConfig
    """With the launcher's ZeRO stage and offload: what is trained, and saved in the run folder and its checkpoints."""
    sources: tuple[Manifest, ...]
    targets: tuple[Manifest, ...]
    """Empty where the run does not adapt."""
    validation: Manifest | None
    classes: tuple[ClassInfo, ...]
    model: Segmenter
    things: tuple[int, ...] = ()
    """Ids of the classes that the feature distance compares."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the cross-entropy; None weighs all pixels alike."""


def prepare_run(
    config: RunConfig, *, world_size: int, resume: bool | None, local_ranks: int | None = None
) -> PreparedRun:
    """Check launcher, data, classes, sizes, network and run folder, before any process waits for another.

    The one place where the launcher's settings are merged into the config.

    Args:
        config: The run as it was written.
        world_size: Number of ranks.
        resume: As `check_resume` takes it.
        local_ranks: Number of ranks on this machine, whose memory is checked; None if the run is for another machine.

    Raises:
        UserError: one of them does not fit the others.
    """
    # What the launcher adds is validated, which leaves batches per rank as they are written.
    config = fit_batches(reconcile_launcher(fit_accumulation(config, world_size)), world_size)
    cache = cache_settings(config.data.cache)
    sources = tuple(open_manifest(folder, cache) for folder in config.data.folders("source"))
    targets = tuple(open_manifest(folder, cache) for folder in config.data.folders("target") if config.objective.adapt)
    classes = class_table(config.data, sources, targets)
    for key, batch in config.batches.items():
        micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
    for manifest in sources:
        describe_empty_classes(manifest)
    for manifest in sources:
        check_crop(manifest, config.data, "source")
    for manifest in targets:
        check_crop(manifest, config.data, "target")
    build_sampler(config.data, sources, "source", config.seed, targets=targets)
    # Otherwise the first evaluation would find it, after the training.
    label_set_members(config.evaluation.label_sets, classes)
    config = _fit_bands(config, (*sources, *targets))
    check_resume(config, resume, RunData(classes, sources, targets))
    check_trackers(config)
    validation = _open_validation(config, classes)
    if local_ranks is not None:
        shared = shared_memory_bytes(config, sources, targets, validation, world_size)
        check_room(config, shared, len(classes), world_size=world_size, local_ranks=local_ranks)
    config = config.model_copy(update={"model": fit_to_crop(config.model, config.data.crop)})
    torch.manual_seed(config.seed)
    things = thing_classes(config.objective.feature_distance, classes)
    counts = (count_classes(config.data, manifest) for manifest in sources)
    weights = class_weights(config.objective.cross_entropy, counts, classes)
    model = build_segmenter(config.model, len(classes))
    _check_sizes(config, validation)
    resumes = latest_checkpoint(config.folder / "checkpoints") is not None
    # A run that resumes needs what it began with for the feature distance alone.
    if config.model.init_from is not None and (not resumes or config.objective.feature_distance.weight > 0):
        initialise(model, config.model, classes)
    model.gives_deepest = config.objective.feature_distance.weight > 0
    # Only to raise its errors early: the run's own optimiser is built beside the engine.
    build_optimizer(config.optimizer, model)
    return PreparedRun(config, sources, targets, validation, classes, model, things, weights)


def _fit_bands(config: RunConfig, manifests: Sequence[Manifest]) -> RunConfig:
    """Set model.bands to that of the shards.

    Raises:
        UserError: folders differ, or the config has another number.
    """
    bands = common_bands(manifests)
    if config.model.bands not in (None, bands):
        raise UserError(
            f"model.bands: {config.model.bands}, and the images of {manifests[0].folder} have {bands} bands; leave the "
            "key out, or name shards of as many"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"bands": bands})})


def _check_sizes(config: RunConfig, validation: Manifest | None) -> None:
    """Check that the backbone takes the crops and what it will get of the validation images.

    Raises:
        UserError: it does not; the message names sizes that it takes.
    """
    options = backbone_options(config.model)
    check_size(options, config.data.crop, "data.crop")
    images = {
        (height, width)
        for shard in (() if validation is None else validation.shards)
        for height, width in zip(shard.heights, shard.widths, strict=True)
    }
    sizes = sorted({size for image in images for size in config.evaluation.network_sizes(config.input_size(*image))})
    for size in sizes[:: max(1, len(sizes) // _SIZES_CHECKED)]:
        check_size(options, size, "evaluation.window", ", and evaluation.input_size to no smaller one")


def _open_validation(config: RunConfig, classes: Sequence[ClassInfo]) -> Manifest | None:
    """Open the shards of data.validation and check that they can be scored; None if the run has none.

    Raises:
        UserError: they cannot be read, or have no labels or none of the classes.
    """
    if config.data.validation is None:
        return None
    manifest = open_manifest(config.data.validation, cache_settings(config.data.cache))
    if not manifest.labelled:
        raise UserError(f"data.validation: {manifest.folder} has no labels to score against; name labelled shards")
    class_map = config.evaluation.class_map
    lookup_table(manifest, classes, class_map)
    for line in describe_missing(manifest, missing_classes(manifest, classes, class_map)):
        _log.info("data.validation: %s", line)
    if manifest.bands != config.model.bands:
        raise UserError(
            f"data.validation: images of {manifest.folder} have {manifest.bands} bands, and those of the source "
            f"{config.model.bands}; build both with the same `bands` in their recipes"
        )
    return manifest
