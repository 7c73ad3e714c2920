"""What can be refused before any process waits for another."""

from typing import NamedTuple

import torch

from dist_pca.config import RunConfig
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.classes import class_table
from dist_pca.data.order import micro_batch_size
from dist_pca.data.sampling import build_sampler
from dist_pca.data.transform import check_crop
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective.feature_distance import thing_classes
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.manifest import Manifest
from dist_pca.training.accumulation import fit_accumulation
from dist_pca.training.deepspeed_config import reconcile_launcher
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.resume import check_resume
from dist_pca.training.trackers import check_trackers
from dist_pca.training.validation import open_validation


class Plan(NamedTuple):
    """What a run needs, once all of it is known to be there and to fit together."""

    config: RunConfig
    """With the launcher's ZeRO stage and offload: what runs, and what the run folder and its checkpoints say."""
    sources: tuple[Manifest, ...]
    targets: tuple[Manifest, ...]
    """Empty where the run does not adapt."""
    validation: Manifest | None
    classes: tuple[ClassInfo, ...]
    model: Segmenter
    things: tuple[int, ...] = ()
    """Classes whose cells the feature distance is over."""


def check(config: RunConfig, *, world_size: int, resume: bool | None) -> Plan:
    """Everything that can be refused before a process group exists: launcher, data, classes, sizes, network, folder.

    The one place where the launcher's settings are merged into the config.

    Raises:
        UserError: something does not fit.
    """
    config = reconcile_launcher(fit_accumulation(config, world_size))
    cache = cache_settings(config.data.cache)
    sources = tuple(open_manifest(folder, cache) for folder in config.data.folders("source"))
    targets = tuple(open_manifest(folder, cache) for folder in config.data.folders("target") if config.objective.adapt)
    classes = class_table(config.data, sources, targets)
    for key, batch in config.batches.items():
        micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
    for manifest in (*sources, *targets):
        check_crop(manifest, config.data.shorter_edge, config.data.crop)
    build_sampler(config.data, sources, "source", config.seed, targets=targets)
    check_resume(config, resume)
    check_trackers(config)
    validation = open_validation(config, classes)
    torch.manual_seed(config.seed)
    things = thing_classes(config.objective.feature_distance, classes)
    model = build_segmenter(config.model, len(classes))
    model.gives_deepest = config.objective.feature_distance.weight > 0
    # Only for what it refuses: the run's own optimiser is built with the process group.
    build_optimizer(config.optimizer, model)
    return Plan(config, sources, targets, validation, classes, model, things)
