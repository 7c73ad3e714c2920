"""Whether a machine has room for a run: loader processes, shared memory and memory, counted before any is used."""

from collections.abc import Sequence

import torch

from dist_pca.config import RunConfig
from dist_pca.cores import available_memory, free_shared_memory, usable_cores
from dist_pca.data.collate import PREFETCH, SLOTS
from dist_pca.data.source import micro_batch_size
from dist_pca.errors import UserError
from dist_pca.model.segmenter import backbone_options, build_network
from dist_pca.shards.manifest import Manifest

LOADERS_PER_CORE = 64
"""Largest number of loader processes for each core, far beyond what makes loading faster."""


def shared_memory_bytes(
    config: RunConfig,
    sources: Sequence[Manifest],
    targets: Sequence[Manifest],
    validation: Manifest | None,
    world_size: int,
) -> int:
    """Bytes of shared memory in which one rank's loader processes keep their batches.

    Args:
        config: The run.
        sources: Shards of the source.
        targets: Shards of the target; empty where the run does not adapt.
        validation: Shards for validation, whose loader processes run in addition.
        world_size: Number of ranks.
    """
    total, (height, width) = 0, config.data.crop
    for (key, batch), manifests in zip(config.batches.items(), (sources, targets), strict=False):
        images = micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
        channels = manifests[0].bands + all(manifest.labelled for manifest in manifests)
        total += config.data.workers * SLOTS * images * channels * height * width
    if validation is not None:
        pixels = max(h * w for shard in validation.shards for h, w in zip(shard.heights, shard.widths, strict=True))
        total += config.data.workers * PREFETCH * (validation.bands + 1) * pixels
    return total


def check_room(config: RunConfig, shared: int, classes: int, *, world_size: int, local_ranks: int) -> None:
    """Check that loader processes, batches and network fit into this machine, before any of them is made.

    Args:
        config: The run.
        shared: Bytes of shared memory of one rank, from `shared_memory_bytes`.
        classes: Number of classes.
        world_size: Number of ranks.
        local_ranks: Number of ranks on this machine.

    Raises:
        UserError: they do not; the message names bytes wanted and bytes free, and the key to lower.
    """
    loaders, cores = config.data.workers * len(config.batches) * local_ranks, usable_cores()
    if loaders > LOADERS_PER_CORE * cores:
        raise UserError(
            f"data.workers: {loaders} loader processes, {config.data.workers} for each domain and rank, are too many "
            f"for {cores} cores; lower it to {LOADERS_PER_CORE * cores // (len(config.batches) * local_ranks)} or less"
        )
    height, width = config.data.crop
    images = sum(
        micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
        for key, batch in config.batches.items()
    )
    memory, bands = available_memory(), backbone_options(config.model).bands
    # As bytes, and as the numbers that the network gets, which are on the GPU if there is one.
    needed = local_ranks * images * height * width * (bands + 1 + (0 if torch.cuda.is_available() else 4 * bands))
    # All ranks of the machine share its memory.
    together = "" if local_ranks == 1 else f" for the {local_ranks} ranks of this machine"
    if needed > memory:
        raise UserError(
            f"data.crop: {images} crops of {height} x {width} pixels on each rank take {_size(needed)} of memory"
            f"{together}, and {_size(memory)} are free; lower data.crop or the batches"
        )
    if (message := lack_of_shared_memory(shared, local_ranks)) is not None:
        raise UserError(f"data.workers: {message}")
    weights = local_ranks * _weight_bytes(config, classes)
    if weights > memory:
        raise UserError(
            f"model: its weights on each rank take {_size(weights)} of memory{together}, and {_size(memory)} are free; "
            "lower model.head_channels or model.projection_channels, or choose a smaller model.backbone"
        )


def lack_of_shared_memory(shared: int, local_ranks: int) -> str | None:
    """Say what is missing if the batches of a machine's ranks do not fit into its shared memory.

    Args:
        shared: Bytes of shared memory of one rank.
        local_ranks: Number of ranks on the machine.
    """
    free = free_shared_memory()
    if free is None or shared * local_ranks <= free:
        return None
    return (
        f"loader processes need {_size(shared * local_ranks)} of shared memory, and /dev/shm has {_size(free)} free; "
        "give the container more (docker run --shm-size), or set data.workers=0"
    )


def _weight_bytes(config: RunConfig, classes: int) -> int:
    try:
        with torch.device("meta"):
            network = build_network(config.model, classes)
    except RuntimeError as error:
        raise UserError(f"model: a network of this size cannot be built ({str(error).splitlines()[0]})") from error
    return sum(4 * tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
