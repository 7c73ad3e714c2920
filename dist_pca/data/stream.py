"""Streams of batches: a WebDataset pipeline whose source knows where each sample lies and when its turn is."""

import atexit
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count, islice
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from torch.utils.data import get_worker_info

from dist_pca.config import DataConfig
from dist_pca.data.classes import chosen_classes, lookup_table
from dist_pca.data.decode import decode_sample
from dist_pca.data.order import Order, micro_batch_positions, micro_batch_size
from dist_pca.data.randomness import Domain
from dist_pca.data.reader import ShardReader
from dist_pca.data.transform import Pixels, apply_crop, check_crop, draw_crop
from dist_pca.errors import UserError
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.manifest import Manifest


class Batch(NamedTuple):
    """One rank's micro-batch of m crops; in pinned memory where there is CUDA."""

    images: torch.Tensor
    """uint8, m x 3 x height x width, RGB."""
    labels: torch.Tensor | None
    """uint8 train ids, m x height x width; None where the shards have no labels."""
    keys: list[str]
    positions: list[int]
    """Where each sample stands in the endless stream."""


class EvaluationSample(NamedTuple):
    """One image at its full size."""

    key: str
    image: Pixels
    """Height x width x 3, RGB."""
    label: Pixels | None
    """Train ids, height x width; None where the shards have no labels."""


class _Crop(NamedTuple):
    image: Pixels
    label: Pixels | None
    key: str
    position: int


def stream(
    config: DataConfig,
    manifest: Manifest,
    domain: Domain,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch: int,
    accumulation: int,
    start_step: int,
) -> Generator[Batch, None, None]:
    """One rank's endless stream of micro-batches, in the order (step, accumulation index).

    Which samples a step takes and how they are cropped depends on seed and step alone. Closing the iterator ends its
    loader processes.

    Args:
        config: Crops, classes and loader processes.
        manifest: The domain's shards.
        domain: Which domain this is; the two are shuffled and augmented independently.
        seed: Seed of the run.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        global_batch: Samples per step, over all ranks and micro-batches.
        accumulation: Micro-batches per step on each rank.
        start_step: First step.

    Raises:
        UserError: at once if the batch cannot be shared out, the crop does not fit into an image, classes are unknown
            or there are no samples; while iterating if a sample cannot be read (shard and key are named).
    """
    if manifest.samples == 0:
        raise UserError(f"data.{domain}: {manifest.folder} holds no samples; build it from a folder with images")
    size = micro_batch_size(
        global_batch, world_size=world_size, accumulation=accumulation, key=f"training.{domain}_batch"
    )
    check_crop(manifest, config.shorter_edge, config.crop)
    table = lookup_table(manifest, chosen_classes(config, manifest)) if manifest.labelled else None
    positions = partial(
        micro_batch_positions,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        global_batch=global_batch,
    )
    order = Order(tuple(len(shard.keys) for shard in manifest.shards), seed, domain, config.shuffle_window)
    return _load(
        partial(_ordered_samples, manifest, order, positions, accumulation, start_step),
        webdataset.map(partial(_crop_sample, config, seed, domain, table)),
        partial(_batches, size=size),
        workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_stream(
    manifest: Manifest, rank: int, world_size: int, *, classes: Sequence[ClassInfo], workers: int = 2
) -> Generator[EvaluationSample, None, None]:
    """Every sample once over all ranks: rank r of W takes the samples r, r + W, ... in the manifest's order.

    Args:
        manifest: The shards.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        classes: Classes whose train ids the labels are given in; others become ignore.
        workers: Loader processes; 0 decodes in this one.

    Raises:
        UserError: at once if labelled shards have none of the classes; while iterating if a sample cannot be read.
    """
    table = lookup_table(manifest, classes) if manifest.labelled else None
    samples = _load(
        partial(_share_of_samples, manifest, rank, world_size),
        webdataset.map(partial(_whole_sample, table)),
        workers=workers,
        pin_memory=False,
    )
    return _as_arrays(samples)


def _load(*stages: Callable[..., Any], workers: int, pin_memory: bool) -> Generator[Any, None, None]:
    loader = webdataset.WebLoader(
        webdataset.DataPipeline(*stages, _hand_over_errors),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
        # The loader draws a seed nobody uses; it must not move the global generator that the model draws from.
        generator=torch.Generator(),
    )
    items = iter(loader)
    # Processes that ignore SIGTERM must be told to end: by whoever closes this generator, at the end of the program, or
    # at the end of a multiprocessing child, which runs no atexit functions, before its queues close (priority 10).
    atexit.register(items.close)
    at_child_exit = Finalize(None, items.close, exitpriority=11)
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        at_child_exit.cancel()
        atexit.unregister(items.close)
        items.close()


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
    manifest: Manifest, order: Order, positions: Callable[[int, int], range], accumulation: int, start_step: int
) -> Iterator[dict[str, Any]]:
    # The loader takes items from its processes in turn, so this deals them whole micro-batches in turn.
    worker, workers = _worker()
    with closing(ShardReader(manifest, keep_open=order.window)) as reader:
        for index in count(start_step * accumulation + worker, workers):
            step, accumulation_index = divmod(index, accumulation)
            for position in positions(step, accumulation_index):
                yield reader.read(*order.locate(position)) | {"__position__": position}


def _share_of_samples(manifest: Manifest, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
    worker, workers = _worker()
    places = ((shard, sample) for shard, content in enumerate(manifest.shards) for sample in range(len(content.keys)))
    with closing(ShardReader(manifest, keep_open=1)) as reader:
        for shard, sample in islice(places, rank + worker * world_size, None, world_size * workers):
            yield reader.read(shard, sample)


def _crop_sample(config: DataConfig, seed: int, domain: Domain, table: Pixels | None, sample: dict[str, Any]) -> _Crop:
    image, label = decode_sample(sample, labelled=table is not None)
    position = sample["__position__"]
    crop = draw_crop(sample["__size__"], config, seed=seed, domain=domain, position=position)
    pixels, train_ids = apply_crop(image, label, crop)
    if table is not None and train_ids is not None:
        train_ids = table[train_ids]
    return _Crop(pixels, train_ids, sample["__key__"], position)


def _batches(crops: Iterator[_Crop], *, size: int) -> Iterator[Batch]:
    # webdataset.batched would read the first sample of the next batch before it gives out this one.
    while members := list(islice(crops, size)):
        labels = [crop.label for crop in members if crop.label is not None]
        yield Batch(
            images=torch.from_numpy(np.stack([crop.image for crop in members])),
            labels=torch.from_numpy(np.stack(labels)) if labels else None,
            keys=[crop.key for crop in members],
            positions=[crop.position for crop in members],
        )


def _whole_sample(table: Pixels | None, sample: dict[str, Any]) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    image, label = decode_sample(sample, labelled=table is not None)
    train_ids = None if table is None or label is None else torch.from_numpy(table[np.asarray(label)])
    # As tensors, pixels pass between processes in shared memory.
    return sample["__key__"], torch.from_numpy(np.array(image)), train_ids


def _as_arrays(samples: Iterator[Any]) -> Generator[EvaluationSample, None, None]:
    for key, image, train_ids in samples:
        yield EvaluationSample(key, image.numpy(), None if train_ids is None else train_ids.numpy())
