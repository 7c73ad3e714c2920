"""Checks that need no process group, and what they have opened and built by the end."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dist_pca.classes import ClassInfo, label_set_members
from dist_pca.config import RunConfig
from dist_pca.data.augment import check_crop
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.class_table import class_table, lookup_table
from dist_pca.data.source import build_sampler, micro_batch_size
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective.feature_distance import thing_classes
from dist_pca.shards.manifest import Manifest, check_classes
from dist_pca.training.accumulation import fit_accumulation
from dist_pca.training.deepspeed_config import reconcile_launcher
from dist_pca.training.loggers import check_trackers
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.run_folder import RunData, check_resume


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


def prepare_run(config: RunConfig, *, world_size: int, resume: bool | None) -> PreparedRun:
    """Check launcher, data, classes, sizes, network and run folder, before any process waits for another.

    The one place where the launcher's settings are merged into the config.

    Args:
        config: The run as it was written.
        world_size: Number of ranks.
        resume: As `check_resume` takes it.

    Raises:
        UserError: one of them does not fit the others.
    """
    config = reconcile_launcher(fit_accumulation(config, world_size))
    cache = cache_settings(config.data.cache)
    sources = tuple(open_manifest(folder, cache) for folder in config.data.folders("source"))
    targets = tuple(open_manifest(folder, cache) for folder in config.data.folders("target") if config.objective.adapt)
    classes = class_table(config.data, sources, targets)
    for key, batch in config.batches.items():
        micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
    for manifest in sources:
        check_classes(manifest)
    for manifest in (*sources, *targets):
        check_crop(manifest, config.data.shorter_edge, config.data.crop)
    build_sampler(config.data, sources, "source", config.seed, targets=targets)
    check_resume(config, resume, RunData(classes, sources, targets))
    check_trackers(config)
    validation = _open_validation(config, classes)
    torch.manual_seed(config.seed)
    things = thing_classes(config.objective.feature_distance, classes)
    model = build_segmenter(config.model, len(classes))
    model.gives_deepest = config.objective.feature_distance.weight > 0
    # Only to raise its errors early: the run's own optimiser is built beside the engine.
    build_optimizer(config.optimizer, model)
    return PreparedRun(config, sources, targets, validation, classes, model, things)


def _open_validation(config: RunConfig, classes: Sequence[ClassInfo]) -> Manifest | None:
    """Open the shards of data.validation and check that they can be scored; None if the run has none.

    Raises:
        UserError: they cannot be read, have no labels or none of the classes, or a label set has an unknown class.
    """
    if config.data.validation is None:
        return None
    manifest = open_manifest(config.data.validation, cache_settings(config.data.cache))
    if not manifest.labelled:
        raise UserError(f"data.validation: {manifest.folder} has no labels to score against; name labelled shards")
    lookup_table(manifest, classes)
    label_set_members(config.evaluation.label_sets, classes)
    return manifest
