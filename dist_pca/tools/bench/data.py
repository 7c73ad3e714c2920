"""Building and reading shards, measured beside bare loops over the same codec and the same transforms."""

import io
import json
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dist_pca.classes import CITYSCAPES_CLASSES
from dist_pca.config import DataConfig
from dist_pca.cores import usable_cores
from dist_pca.data.augment import apply_crop, draw_crop
from dist_pca.data.class_table import lookup_table
from dist_pca.data.collate import Batch
from dist_pca.data.decode import resized_size
from dist_pca.data.read import ShardReader
from dist_pca.data.source import build_sampler
from dist_pca.data.stream import stream
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import Manifest, Shard, load_manifest, save_manifest
from dist_pca.tools.bench.demonstration import train_demonstration
from dist_pca.tools.bench.report import Record
from dist_pca.tools.demo.streets import DAY, write_streets

SIZE = (720, 1280)
"""Height and width of the drawn images."""
IMAGES, COPIES = 16, 16
"""Different images, and how often the builder meets each."""
BATCH, BATCHES = 8, 10
SAMPLES = 25_000
"""Number of samples in the manifest for loading and seeking, with 19 classes."""
FAR_STEP = 1_000_000
MEMORY_BATCHES = 20_000
TRAINING_STEPS = 30


def measure_reading(folder: Path, repeats: int) -> list[Record]:
    """Samples per second of the loader against the bare loop, and of all cores against one.

    The bare loop decodes the same files from memory, draws the same crops and stacks them, in this one process.
    """
    manifest = build_shards("folder", _raw(folder), folder / "jpg", image_format="jpg", samples_per_shard=4)
    with closing(_stream(manifest, workers=1)) as batches, closing(_bare_batches(manifest)) as bare:
        rates = [(_rate(batches), _rate(bare)) for _ in range(repeats)]
    cores = usable_cores()
    with closing(_stream(manifest, workers=cores)) as batches:
        parallel = statistics.median(_rate(batches) for _ in range(repeats))
    loader, loop = (statistics.median(column) for column in zip(*rates, strict=True))
    return [
        _record("loader_ratio", statistics.median(one / other for one, other in rates), "of the bare loop's rate"),
        _record("loader_images_per_second", loader, "images/s, one worker"),
        _record("bare_loop_images_per_second", loop, "images/s"),
        _record("loader_scaling", parallel / loader / cores, f"of {cores} times one worker's rate, {cores} workers"),
    ]


def measure_building(folder: Path, repeats: int) -> list[Record]:
    """Images per second of the builder on all cores against cores times a bare encoding loop on one.

    Of a build and one of four times as many images, so that what processes take to start does not count.
    """
    cores = usable_cores()
    raw = _raw(folder)
    many = _copies(raw, folder / "many", COPIES)
    few = _copies(raw, folder / "few", COPIES // 4)
    ratios, built, bare = [], [], []
    for repeat in range(repeats):
        seconds = [_build_seconds(source, folder / f"built-{source.name}-{repeat}", cores) for source in (few, many)]
        built.append(IMAGES * (COPIES - COPIES // 4) / (seconds[1] - seconds[0]))
        bare.append(_bare_encoding_rate(raw))
        ratios.append(built[-1] / bare[-1] / cores)
    return [
        _record("builder_ratio", statistics.median(ratios), f"of {cores} cores times the bare loop's rate"),
        _record("builder_images_per_second", statistics.median(built), f"images/s, {cores} workers"),
        _record("bare_encoding_images_per_second", statistics.median(bare), "images/s, one core"),
    ]


def measure_seeking(folder: Path) -> list[Record]:
    """Seconds to load a large manifest, and from there to the places of a batch at a far step."""
    large = _large_manifest(folder / "large")
    start = time.perf_counter()
    manifest = load_manifest(large)
    loaded = time.perf_counter()
    sampler = build_sampler(_config(workers=0), [manifest], "source", 0)
    for sample_index in range(FAR_STEP * BATCH, (FAR_STEP + 1) * BATCH):
        sampler.select(sample_index)
    sought = time.perf_counter()
    return [
        _record("manifest_seconds", loaded - start, f"s, {SAMPLES:,} samples"),
        _record("seek_seconds", sought - loaded, f"s, to step {FAR_STEP:,}"),
    ]


def measure_memory(folder: Path) -> list[Record]:
    """What this process holds more after many batches than after a tenth of them."""
    manifest = build_shards("folder", _raw(folder), folder / "small", max_edge=32, samples_per_shard=4)
    config = DataConfig(source="", shorter_edge=(16, 24), crop=(16, 16), workers=0)
    resident = []
    with closing(_stream(manifest, workers=0, config=config, batch=1)) as batches:
        for number in range(MEMORY_BATCHES + 1):
            next(batches)
            if number in (MEMORY_BATCHES // 10, MEMORY_BATCHES):
                resident.append(_resident_bytes())
    growth = (resident[1] - resident[0]) / 2**20
    return [_record("loader_memory_growth", growth, f"MiB over {MEMORY_BATCHES:,} batches")]


def measure_training(folder: Path) -> list[Record]:
    """Share of a training step that waits for data: the demonstration's network on two processes or on all GPUs.

    Raises:
        UserError: the run fails.
    """
    run = train_demonstration(folder, steps=TRAINING_STEPS, log_every=TRAINING_STEPS // 2)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return [
        _record("data_wait_share", last["data_wait_share"], "of a training step"),
        _record("training_seconds_per_step", last["seconds_per_step"], "s"),
    ]


MEASUREMENTS: dict[str, Callable[[Path, int], list[Record]]] = {
    "reading": measure_reading,
    "building": measure_building,
    "seeking": lambda folder, _: measure_seeking(folder),
    "memory": lambda folder, _: measure_memory(folder),
    "training": lambda folder, _: measure_training(folder),
}
"""Everything that is measured, each in a folder of its own."""


def _record(name: str, value: float, unit: str) -> Record:
    return {"name": name, "value": value, "unit": unit}


def _config(workers: int) -> DataConfig:
    return DataConfig(source="", shorter_edge=(540, 760), crop=(512, 512), workers=workers)


def _stream(
    manifest: Manifest, *, workers: int, config: DataConfig | None = None, batch: int = BATCH
) -> Generator[Batch, None, None]:
    return stream(
        config or _config(workers),
        [manifest],
        "source",
        seed=0,
        rank=0,
        world_size=1,
        global_batch=batch,
        accumulation=1,
        start_step=0,
    )


def _rate(batches: Iterator[object]) -> float:
    """Images per second; batches that lie ready are not counted."""
    for _ in range(4 * usable_cores()):
        next(batches)
    start = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return BATCH * BATCHES / (time.perf_counter() - start)


def _bare_batches(manifest: Manifest) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    config, table = _config(workers=0), lookup_table(manifest, manifest.classes)
    with closing(ShardReader(manifest, keep_open=1)) as reader:
        samples = [reader.read(n, index) for n, shard in enumerate(manifest.shards) for index in range(len(shard.keys))]
    for start in count(0, BATCH):
        images, labels = [], []
        for sample_index in range(start, start + BATCH):
            sample = samples[sample_index % len(samples)]
            image = Image.open(io.BytesIO(sample["jpg"]))
            height, width = resized_size(sample["__size__"], config.shorter_edge[1])
            image.draft(None, (width, height))
            label = Image.open(io.BytesIO(sample["label.png"]))
            crop = draw_crop(sample["__size__"], config, seed=0, domain="source", index=sample_index)
            pixels, ids = apply_crop(image, label, crop)
            assert ids is not None
            images.append(pixels)
            labels.append(table.take(ids))
        yield torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


def _raw(folder: Path) -> Path:
    if not (folder / "raw").is_dir():
        write_streets(folder / "raw", DAY, split="street", indices=range(IMAGES), seed=0, size=SIZE)
    return folder / "raw"


def _copies(raw: Path, folder: Path, copies: int) -> Path:
    """The raw images under several names each."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        for file in (raw / part).iterdir():
            for copy in range(copies):
                (folder / part / f"{file.stem}-{copy}{file.suffix}").hardlink_to(file)
    (folder / "classes.yaml").hardlink_to(raw / "classes.yaml")
    return folder


def _build_seconds(raw: Path, out: Path, workers: int) -> float:
    start = time.perf_counter()
    build_shards("folder", raw, out, workers=workers, image_format="jpg", samples_per_shard=16)
    return time.perf_counter() - start


def _bare_encoding_rate(raw: Path) -> float:
    """Images per second of decoding raw images and labels and encoding them as shards hold them, and no more."""
    start = time.perf_counter()
    files = sorted((raw / "images").iterdir())
    for file in files:
        Image.open(file).convert("RGB").save(io.BytesIO(), "JPEG", quality=90)
        ids = np.asarray(Image.open(raw / "labels" / file.name))
        Image.fromarray(ids).save(io.BytesIO(), "PNG")
    return len(files) / (time.perf_counter() - start)


def _large_manifest(folder: Path) -> Path:
    """A shard folder of empty shards whose manifest is that of a large data set."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    shards = []
    for number, first in enumerate(range(0, SAMPLES, 250)):
        counts = draw.integers(0, 10**6, (250, len(CITYSCAPES_CLASSES)))
        offsets = [4096 * index for index in range(250)]
        name = f"shard-{number:06d}.tar"
        (folder / name).touch()
        os.truncate(folder / name, 250 * 4096)
        keys = [f"images/{first + index:08d}" for index in range(250)]
        shards.append(
            Shard(name, 250 * 4096, "0" * 64, keys, offsets, [4096] * 250, [1052] * 250, [1914] * 250, counts.tolist())
        )
    save_manifest(Manifest(folder, "bench", 1, "all", True, CITYSCAPES_CLASSES, tuple(shards)))
    return folder


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
