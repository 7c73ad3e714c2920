"""Validation during training: the score that `dist-pca evaluate` would give the next checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.class_table import lookup_table
from dist_pca.errors import UserError
from dist_pca.evaluation.evaluate import evaluate
from dist_pca.evaluation.report import label_set_members
from dist_pca.model.segmenter import build_network
from dist_pca.shards.manifest import Manifest
from dist_pca.training.ema import EMAShards, gather_network
from dist_pca.training.rank_statistics import averaged_statistics


def open_validation(config: RunConfig, classes: Sequence[ClassInfo]) -> Manifest | None:
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


def validate(
    engine: Any,
    ema: EMAShards | None,
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    *,
    rank: int,
    world_size: int,
    progress: Callable[[], object],
) -> float:
    """Compute the mean IoU on labelled shards, of the moving average if there is one, else of the trained weights.

    Collective; images are divided over ranks. Each rank builds a full copy of the network, since under ZeRO 3 ranks
    with different numbers of images would wait for each other's parameters. Its batch-norm statistics are their mean
    over ranks, as in a checkpoint.

    Args:
        engine: DeepSpeed's.
        ema: The moving average.
        manifest: The shards.
        classes: Classes by train id.
        config: The run.
        rank: This rank.
        world_size: Number of ranks.
        progress: Called for every image.

    Raises:
        UserError: as `evaluate` does.
    """
    network = build_network(config.model, len(classes)).to(engine.device)
    state = network.state_dict()
    with averaged_statistics(engine, ema):
        for name, value in gather_network(engine, ema):
            state[name].copy_(value)
    network.register_forward_pre_hook(lambda *_: progress() and None)
    scores = evaluate(
        network, manifest, classes, config, device=engine.device, rank=rank, world_size=world_size, quiet=True
    )
    return scores.mean_iou
