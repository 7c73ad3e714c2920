"""Streams of batches: WebDataset pipelines whose stages each have a file: source, read, decode, augment, collate.

`to_device` follows in the training process.
"""

import atexit
import logging
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
import webdataset

from dist_pca.classes import ClassInfo
from dist_pca.config import CacheConfig, DataConfig
from dist_pca.data.augment import augment_sample, check_crop
from dist_pca.data.class_table import chosen_classes, lookup_table
from dist_pca.data.collate import PREFETCH, Batch, SharedMemoryBuffer, Slot, common_bands
from dist_pca.data.decode import Pixels, decode_evaluation_sample, decode_or_replace, resize_range
from dist_pca.data.randomness import Domain
from dist_pca.data.read import open_reader, read_evaluation_samples, read_samples
from dist_pca.data.source import (
    build_sampler,
    evaluation_samples,
    micro_batch_indices,
    micro_batch_size,
    ordered_samples,
)
from dist_pca.errors import LostProcess, UserError
from dist_pca.shards.manifest import Manifest

_log = logging.getLogger("dist_pca.data")
LOST_LOADER = (
    "a loader process was killed, most likely because memory ran out; lower data.workers and start the run again"
)


class EvaluationSample(NamedTuple):
    """One image at full size, with its labels."""

    key: str
    image: Pixels
    """uint8, height x width x bands."""
    label: Pixels | None
    """Train ids, height x width; None if the shards have no labels."""
    source: str
    """Path of the file that the image was made from, as its shard says it (untrusted); empty if it does not."""


def stream(
    config: DataConfig,
    manifests: Sequence[Manifest],
    domain: Domain,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch: int,
    accumulation: int,
    start_step: int,
    offset: int = 0,
    targets: Sequence[Manifest] = (),
) -> Generator[Batch, None, None]:
    """Yield one rank's micro-batches without end, ordered by step and accumulation index.

    The samples of a step and their crops depend on the seed and the step only. Closing the iterator ends its loader
    processes. A corrupt sample is logged and replaced by another one, which is a function of the seed too.

    Args:
        config: Crops, classes, sampling and loader processes.
        manifests: The domain's shard folders.
        domain: Domain of the folders; the two domains are shuffled and augmented independently.
        seed: Seed of the run.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        global_batch: Samples per step, over all ranks and micro-batches.
        accumulation: Micro-batches per step on each rank.
        start_step: First step.
        offset: Samples that earlier steps of another batch have used more than steps of this batch would have.
        targets: For the source, the target's shard folders, which are needed for pairing.

    Raises:
        UserError: immediately if the batch cannot be divided evenly, the crop does not fit into an image, folders have
            unlike bands, classes are unknown or there are no samples; while iterating if a shard cannot be read (the
            message names shard and key), or more than data.max_corrupt_share of the samples are corrupt.
    """
    sampler = build_sampler(config, manifests, domain, seed, targets=targets)
    size = micro_batch_size(
        global_batch, world_size=world_size, accumulation=accumulation, key=f"training.{domain}_batch"
    )
    for manifest in manifests:
        check_crop(manifest, config, domain)
    labelled = all(manifest.labelled for manifest in manifests)
    tables = [lookup_table(manifest, chosen_classes(config, manifest)) if labelled else None for manifest in manifests]
    indices = partial(
        micro_batch_indices,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        global_batch=global_batch,
        offset=offset,
    )
    openers = [partial(open_reader, manifest, config.shuffle_window, config.cache) for manifest in manifests]
    bands = common_bands((*manifests, *targets))
    buffer = SharedMemoryBuffer(config.workers, size, config.crop, labelled=labelled, bands=bands)
    slots = _load(
        partial(ordered_samples, sampler, indices, accumulation, start_step),
        partial(read_samples, openers),
        partial(map, partial(decode_or_replace, resize_range(config, domain)[1], sampler, openers, labelled)),
        partial(map, partial(augment_sample, config, seed, domain, tables)),
        buffer.collate,
        workers=config.workers,
    )
    epoch = sum(order.samples for order in sampler.mixture.orders)
    return _batches(slots, buffer, domain, config.max_corrupt_share, epoch / world_size)


def evaluation_stream(
    manifest: Manifest,
    rank: int,
    world_size: int,
    *,
    classes: Sequence[ClassInfo],
    class_map: Mapping[str, str] | None = None,
    bands: int = 3,
    workers: int = 2,
    cache: CacheConfig | None = None,
) -> Generator[EvaluationSample, None, None]:
    """Yield every sample once over all ranks: rank r of W gets the samples r, r + W, ... in the manifest's order.

    Args:
        manifest: The shards.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        classes: Classes by train id, to which labels are converted; others become ignore.
        class_map: Name in `classes` by name in the shards, for names that differ.
        bands: Bands that images must have.
        workers: Loader processes; 0 loads in this process.
        cache: Cache for shards of a URL; None takes the defaults.

    Raises:
        UserError: immediately if the shards have other bands, or if labelled shards have none of the classes or lack
            one of `class_map`; while iterating if a sample cannot be read.
    """
    if manifest.bands != bands:
        raise UserError(
            f"shards {manifest.folder}: images of {manifest.bands} bands, and the network takes {bands}; name shards "
            f"of {bands} bands"
        )
    table = lookup_table(manifest, classes, class_map) if manifest.labelled else None
    opener = partial(open_reader, manifest, 1, cache or CacheConfig())
    samples = _load(
        partial(evaluation_samples, manifest, rank, world_size),
        partial(read_evaluation_samples, opener),
        partial(map, partial(decode_evaluation_sample, table, manifest.label_member)),
        workers=workers,
    )
    return _as_arrays(samples)


def _batches(
    slots: Generator[Slot, None, None],
    buffer: SharedMemoryBuffer,
    domain: Domain,
    max_share: float,
    epoch: float,
) -> Generator[Batch, None, None]:
    """Copy batches out of the buffer, and log corrupt samples.

    Raises:
        UserError: they exceed a share of an epoch or of all samples read, whichever is more.
    """
    read = skipped = 0
    with closing(slots):
        for batch in map(buffer.copy_out, slots):
            read, skipped = read + len(batch.keys), skipped + len(batch.skipped)
            for message in batch.skipped:
                _log.warning("data.%s: skipped a sample: %s", domain, message)
            if batch.skipped and skipped > max_share * max(read, epoch):
                raise UserError(
                    f"data.{domain}: {skipped} corrupt samples among {read}, more than data.max_corrupt_share "
                    f"{max_share:g} allows; the last one: {batch.skipped[-1]}"
                )
            yield batch


def _as_arrays(samples: Iterator[Any]) -> Generator[EvaluationSample, None, None]:
    for key, image, train_ids, source in samples:
        yield EvaluationSample(key, image.numpy(), None if train_ids is None else train_ids.numpy(), source)


def _load(*stages: Callable[..., Any], workers: int) -> Generator[Any, None, None]:
    """Run a pipeline in loader processes, which are ended when the generator is closed or the program ends."""
    loader = webdataset.WebLoader(
        webdataset.DataPipeline(*stages, _errors_as_items),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_ignore_signals,
        # The loader draws a seed, which is not used; it must not advance the global generator, used by the model.
        generator=torch.Generator(),
    )
    items = iter(loader)
    # Loader processes ignore SIGTERM, so they must be ended explicitly: when this generator is closed, at the end of
    # the program, or at the end of a multiprocessing child, which runs no atexit functions, before its queues are
    # closed (priority 10).
    atexit.register(items.close)
    at_child_exit = Finalize(None, items.close, exitpriority=11)
    others = set(active_children())
    processes: set[BaseProcess] = set()

    def own() -> set[BaseProcess]:
        # The processes that existed at the first item; later ones belong to other streams.
        return processes or (set(active_children()) - others if workers else set())

    try:
        for item in items:
            processes = own()
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, OSError) as error:
        if _any_died(own()):
            raise LostProcess(LOST_LOADER) from error
        raise
    finally:
        at_child_exit.cancel()
        atexit.unregister(items.close)
        items.close()
        # After one process has died, the loader does not stop the others, and they ignore SIGTERM.
        for process in own():
            process.kill()
            process.join()


def _any_died(processes: set[BaseProcess]) -> bool:
    try:
        return bool(wait([process.sentinel for process in processes], timeout=1))
    except RuntimeError:
        # The loader's SIGCHLD handler raises this when a loader process dies.
        return True


def _ignore_signals(_worker: int) -> None:
    # Ctrl-C and SLURM signal the whole process group, but the trainer still needs batches until it stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _errors_as_items(items: Iterator[Any]) -> Iterator[Any]:
    # Yield the error as an item: raised in a worker, it would be wrapped in the worker's traceback.
    try:
        yield from items
    except UserError as error:
        yield error
