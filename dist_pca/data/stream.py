"""Streams of batches: a WebDataset pipeline whose source knows where each sample lies and when its turn is."""

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

from dist_pca.config import CacheConfig, DataConfig, SamplingConfig
from dist_pca.data.batch import PREFETCH, Batch, Cut, Filled, Ring
from dist_pca.data.cache import CacheSettings, cache_settings
from dist_pca.data.classes import chosen_classes, lookup_table
from dist_pca.data.decode import decode_sample
from dist_pca.data.order import micro_batch_positions, micro_batch_size
from dist_pca.data.randomness import Domain
from dist_pca.data.reader import ShardReader
from dist_pca.data.sampling import Choice, Sampler, build_sampler
from dist_pca.data.transform import Crop, Pixels, apply_crop, check_crop, crop_label, draw_crop, resized_size
from dist_pca.errors import CorruptSample, UserError
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.manifest import Manifest

_log = logging.getLogger("dist_pca.data")
_AHEAD = 128
"""Samples of each loader process whose shards are fetched before their turn comes."""
_MOST_REPLACEMENTS = 8
"""Samples drawn in the place of a corrupt one before all of them are taken to be."""


class EvaluationSample(NamedTuple):
    """One image at its full size."""

    key: str
    image: Pixels
    """Height x width x 3, RGB."""
    label: Pixels | None
    """Train ids, height x width; None where the shards have no labels."""


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
    """One rank's endless stream of micro-batches, in the order (step, accumulation index).

    Which samples a step takes and how they are cropped depends on seed and step alone. Closing the iterator ends its
    loader processes. A sample that cannot be decoded is logged, and another takes its place, always the same one.

    Args:
        config: Crops, classes, sampling and loader processes.
        manifests: The domain's shard folders.
        domain: Which domain this is; the two are shuffled and augmented independently.
        seed: Seed of the run.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        global_batch: Samples per step, over all ranks and micro-batches.
        accumulation: Micro-batches per step on each rank.
        start_step: First step.
        targets: For the source, the target's shard folders, which pairing looks at.

    Raises:
        UserError: at once if the batch cannot be shared out, the crop does not fit into an image, classes are unknown
            or there are no samples; while iterating if a shard cannot be read (shard and key are named), or more than
            data.max_corrupt_share of the samples cannot be decoded.
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
    """Every sample once over all ranks: rank r of W takes the samples r, r + W, ... in the manifest's order.

    Args:
        manifest: The shards.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        classes: Classes whose train ids the labels are given in; others become ignore.
        workers: Loader processes; 0 decodes in this one.
        cache: For shards of a URL; None takes the defaults.

    Raises:
        UserError: at once if labelled shards have none of the classes; while iterating if a sample cannot be read.
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
        # The loader draws a seed nobody uses; it must not move the global generator that the model draws from.
        generator=torch.Generator(),
    )
    items = iter(loader)
    # Processes that ignore SIGTERM must be told to end: by whoever closes this generator, at the end of the program, or
    # at the end of a multiprocessing child, which runs no atexit functions, before its queues close (priority 10).
    atexit.register(items.close)
    at_child_exit = Finalize(None, items.close, exitpriority=11)
    others = set(active_children())
    processes: set[BaseProcess] = set()

    def own() -> set[BaseProcess]:
        # Those that came with the first item; whoever comes later belongs to another stream.
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
                "a loader process was killed, most likely for want of memory; lower data.workers"
            ) from error
        raise
    finally:
        at_child_exit.cancel()
        atexit.unregister(items.close)
        items.close()
        # After one of them has died the loader tells the others nothing, and they ignore SIGTERM.
        for process in own():
            process.kill()
            process.join()


def _any_died(processes: set[BaseProcess]) -> bool:
    try:
        return bool(wait([process.sentinel for process in processes], timeout=1))
    except RuntimeError:
        # The loader's own handler of a child's death interrupts whatever comes after it.
        return True


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # Ctrl-C and SLURM signal the whole process group: the trainer decides, and still needs batches while it does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _hand_over_errors(items: Iterator[Any]) -> Iterator[Any]:
    # An exception that crosses processes as such arrives wrapped in the worker's traceback; an item arrives as it is.
    try:
        yield from items
    except UserError as error:
        yield error


def _worker() -> tuple[int, int]:
    """Number of this loader process and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _ordered_samples(
    sampler: Sampler,
    openers: Sequence[Callable[[], ShardReader]],
    positions: Callable[[int, int], range],
    accumulation: int,
    start_step: int,
) -> Iterator[_Taken]:
    # The loader takes items from its processes in turn, so this deals them whole micro-batches in turn.
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
    """The crop at a position; of another sample where its own is corrupt."""
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
                raise UserError(f"{error}; {_MOST_REPLACEMENTS} samples drawn in its place are no better") from error
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
    """The first crop that shows enough of a class, or of all that may be drawn the one that shows most."""
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
    """Log what was skipped, and stop where it is more than a share of an epoch or of all samples taken."""
    taken = skipped = 0
    with closing(batches):
        for batch in map(ring.take, batches):
            taken, skipped = taken + len(batch.keys), skipped + len(batch.skipped)
            for line in batch.skipped:
                _log.warning("data.%s: skipped a sample: %s", domain, line)
            if batch.skipped and skipped > max_share * max(taken, epoch):
                raise UserError(
                    f"data.{domain}: {skipped} corrupt samples among {taken}, more than data.max_corrupt_share "
                    f"{max_share:g} allows, the last one: {batch.skipped[-1]}"
                )
            yield batch


def _whole_sample(
    table: Pixels | None, label_member: str, sample: dict[str, Any]
) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    image, label = decode_sample(sample, label_member=None if table is None else label_member)
    train_ids = None if table is None or label is None else torch.from_numpy(table[np.asarray(label)])
    # As tensors, pixels pass between processes in shared memory.
    return sample["__key__"], torch.from_numpy(np.array(image)), train_ids


def _as_arrays(samples: Iterator[Any]) -> Generator[EvaluationSample, None, None]:
    for key, image, train_ids in samples:
        yield EvaluationSample(key, image.numpy(), None if train_ids is None else train_ids.numpy())
