"""Streams of batches: a WebDataset pipeline that reads samples by index, in an order given by seed and step."""

import atexit
import logging
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, islice
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import get_worker_info

from dist_pca.classes import ClassInfo
from dist_pca.config import CacheConfig, DataConfig, SamplingConfig
from dist_pca.data.batch import PREFETCH, Batch, Cut, Filled, Ring
from dist_pca.data.cache import CacheSettings, cache_settings
from dist_pca.data.class_table import chosen_classes, lookup_table
from dist_pca.data.decode import decode_sample
from dist_pca.data.order import micro_batch_positions, micro_batch_size
from dist_pca.data.randomness import Domain
from dist_pca.data.reader import ShardReader
from dist_pca.data.sampling import Choice, Sampler, build_sampler
from dist_pca.data.transform import Crop, Pixels, apply_crop, check_crop, crop_label, draw_crop, resized_size
from dist_pca.errors import CorruptSample, UserError
from dist_pca.shards.manifest import Manifest

_log = logging.getLogger("dist_pca.data")
_AHEAD = 128
"""Number of samples that each loader process looks ahead to prefetch their shards."""
_MOST_REPLACEMENTS = 8
"""Number of replacements drawn for a corrupt sample before the stream fails."""


class EvaluationSample(NamedTuple):
    """One image at full size, with its labels."""

    key: str
    image: Pixels
    """uint8 RGB, height x width x 3."""
    label: Pixels | None
    """Train ids, height x width; None if the shards have no labels."""


class _Taken(NamedTuple):
    position: int
    choice: Choice
    sample: dict[str, Any] | CorruptSample


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
        targets: For the source, the target's shard folders, which are needed for pairing.

    Raises:
        UserError: immediately if the batch cannot be divided evenly, the crop does not fit into an image, classes are
            unknown or there are no samples; while iterating if a shard cannot be read (the message names shard and
            key), or more than data.max_corrupt_share of the samples are corrupt.
    """
    sampler = build_sampler(config, manifests, domain, seed, targets=targets)
    size = micro_batch_size(
        global_batch, world_size=world_size, accumulation=accumulation, key=f"training.{domain}_batch"
    )
    for manifest in manifests:
        check_crop(manifest, config.shorter_edge, config.crop)
    labelled = all(manifest.labelled for manifest in manifests)
    tables = [lookup_table(manifest, chosen_classes(config, manifest)) if labelled else None for manifest in manifests]
    positions = partial(
        micro_batch_positions,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        global_batch=global_batch,
    )
    cache = cache_settings(config.cache)
    openers = [partial(ShardReader, manifest, config.shuffle_window, cache) for manifest in manifests]
    ring = Ring(config.workers, size, config.crop, labelled=labelled)
    batches = _load(
        partial(_ordered_samples, sampler, openers, positions, accumulation, start_step),
        webdataset.map(partial(_crop_sample, config, seed, domain, sampler, openers, tables)),
        ring.fill,
        workers=config.workers,
    )
    epoch = sum(manifest.samples for manifest in manifests)
    return _watched(batches, ring, domain, config.max_corrupt_share, epoch / world_size)


def evaluation_stream(
    manifest: Manifest,
    rank: int,
    world_size: int,
    *,
    classes: Sequence[ClassInfo],
    workers: int = 2,
    cache: CacheConfig | None = None,
) -> Generator[EvaluationSample, None, None]:
    """Yield every sample once over all ranks: rank r of W gets the samples r, r + W, ... in the manifest's order.

    Args:
        manifest: The shards.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        classes: Classes by train id, to which labels are converted; others become ignore.
        workers: Loader processes; 0 loads in this process.
        cache: Cache for shards of a URL; None takes the defaults.

    Raises:
        UserError: immediately if labelled shards have none of the classes; while iterating if a sample cannot be read.
    """
    table = lookup_table(manifest, classes) if manifest.labelled else None
    samples = _load(
        partial(_share_of_samples, manifest, rank, world_size, cache_settings(cache or CacheConfig())),
        webdataset.map(partial(_whole_sample, table, manifest.label_member)),
        workers=workers,
    )
    return _as_arrays(samples)


def _load(*stages: Callable[..., Any], workers: int) -> Generator[Any, None, None]:
    loader = webdataset.WebLoader(
        webdataset.DataPipeline(*stages, _hand_over_errors),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
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
            raise UserError(
                "a loader process was killed, most likely because memory ran out; lower data.workers"
            ) from error
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


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # Ctrl-C and SLURM signal the whole process group, but the trainer still needs batches until it stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _hand_over_errors(items: Iterator[Any]) -> Iterator[Any]:
    # Yield the error as an item: raised in a worker, it would be wrapped in the worker's traceback.
    try:
        yield from items
    except UserError as error:
        yield error


def _worker() -> tuple[int, int]:
    """Index of this loader process, and the number of loader processes."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _ordered_samples(
    sampler: Sampler,
    openers: Sequence[Callable[[], ShardReader]],
    positions: Callable[[int, int], range],
    accumulation: int,
    start_step: int,
) -> Iterator[_Taken]:
    # The loader takes items from its processes in turn, so whole micro-batches are dealt to them in turn.
    worker, workers = _worker()
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(opener())) for opener in openers]
        choices = (
            (position, sampler.choose(position))
            for index in count(start_step * accumulation + worker, workers)
            for position in positions(*divmod(index, accumulation))
        )
        upcoming = deque(islice(choices, _AHEAD))
        for taken in count():
            if taken % (_AHEAD // 4) == 0:
                for part, reader in enumerate(readers):
                    shards = (choice.place.shard for _, choice in upcoming if choice.place.part == part)
                    reader.prefetch(list(dict.fromkeys(shards)))
            position, choice = upcoming.popleft()
            upcoming.append(next(choices))
            yield _Taken(position, choice, _read(readers[choice.place.part], choice))


def _read(reader: ShardReader, choice: Choice) -> dict[str, Any] | CorruptSample:
    try:
        return reader.read(choice.place.shard, choice.place.sample)
    except CorruptSample as error:
        return error


def _share_of_samples(manifest: Manifest, rank: int, world_size: int, cache: CacheSettings) -> Iterator[dict[str, Any]]:
    worker, workers = _worker()
    places = ((shard, sample) for shard, content in enumerate(manifest.shards) for sample in range(len(content.keys)))
    with closing(ShardReader(manifest, 1, cache)) as reader:
        for shard, sample in islice(places, rank + worker * world_size, None, world_size * workers):
            yield reader.read(shard, sample)


def _crop_sample(
    config: DataConfig,
    seed: int,
    domain: Domain,
    sampler: Sampler,
    openers: Sequence[Callable[[], ShardReader]],
    tables: Sequence[Pixels | None],
    taken: _Taken,
) -> Cut:
    """Decode and crop a sample; if it is corrupt, a replacement."""
    position, choice, sample = taken
    skipped: list[str] = []
    while True:
        part = choice.place.part
        try:
            if isinstance(sample, CorruptSample):
                raise sample
            image, label = decode_sample(
                sample,
                label_member=None if tables[part] is None else sampler.manifests[part].label_member,
                enough=resized_size(sample["__size__"], config.shorter_edge[1]),
            )
            break
        except CorruptSample as error:
            skipped.append(str(error))
            if len(skipped) > _MOST_REPLACEMENTS:
                raise UserError(f"{error}; {_MOST_REPLACEMENTS} replacements are corrupt too") from error
        choice = Choice(sampler.instead_of(position, len(skipped)), None)
        with closing(openers[choice.place.part]()) as reader:
            sample = _read(reader, choice)
    draw = partial(draw_crop, sample["__size__"], config, seed=seed, domain=domain, position=position)
    table = tables[part]
    if label is None or table is None:
        return Cut(apply_crop(image, None, draw())[0], None, sample["__key__"], position, skipped)
    crop = draw() if choice.wanted is None else _crop_that_shows(choice.wanted, label, table, draw, config.sampling)
    pixels, train_ids = apply_crop(image, label, crop)
    assert train_ids is not None
    return Cut(pixels, table.take(train_ids), sample["__key__"], position, skipped)


def _crop_that_shows(
    wanted: int, label: Image.Image, table: Pixels, draw: Callable[..., Crop], sampling: SamplingConfig
) -> Crop:
    """Draw crops until one has enough pixels of a class; if none has, return the one with the most."""
    best, most = draw(), -1
    for attempt in range(sampling.crop_attempts):
        crop = draw(attempt=attempt)
        shown = int((table[crop_label(label, crop)] == wanted).sum())
        if shown > most:
            best, most = crop, shown
        if most >= sampling.min_crop_pixels:
            break
    return best


def _watched(
    batches: Generator[Filled, None, None], ring: Ring, domain: Domain, max_share: float, epoch: float
) -> Generator[Batch, None, None]:
    """Log corrupt samples, and fail if they exceed a share of an epoch or of all samples read, whichever is more."""
    taken = skipped = 0
    with closing(batches):
        for batch in map(ring.take, batches):
            taken, skipped = taken + len(batch.keys), skipped + len(batch.skipped)
            for line in batch.skipped:
                _log.warning("data.%s: skipped a sample: %s", domain, line)
            if batch.skipped and skipped > max_share * max(taken, epoch):
                raise UserError(
                    f"data.{domain}: {skipped} corrupt samples among {taken}, more than data.max_corrupt_share "
                    f"{max_share:g} allows; the last one: {batch.skipped[-1]}"
                )
            yield batch


def _whole_sample(
    table: Pixels | None, label_member: str, sample: dict[str, Any]
) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    image, label = decode_sample(sample, label_member=None if table is None else label_member)
    train_ids = None if table is None or label is None else torch.from_numpy(table[np.asarray(label)])
    # Tensors are passed between processes in shared memory.
    return sample["__key__"], torch.from_numpy(np.array(image)), train_ids


def _as_arrays(samples: Iterator[Any]) -> Generator[EvaluationSample, None, None]:
    for key, image, train_ids in samples:
        yield EvaluationSample(key, image.numpy(), None if train_ids is None else train_ids.numpy())
