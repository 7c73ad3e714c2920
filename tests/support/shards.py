"""Small shard folders made with webdataset's own writer."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.config import DataConfig
from dist_pca.files import file_sha256
from dist_pca.shards.manifest import Manifest, Shard, save_manifest

CLASSES = tuple(ClassInfo(name, (60 * index, 200, 100)) for index, name in enumerate(("road", "sky", "car")))
HEIGHT, WIDTH = 24, 40


def data_config(**keys: Any) -> DataConfig:
    defaults = {"source": "unused", "shorter_edge": (20, 28), "crop": (16, 16), "workers": 0, "shuffle_window": 2}
    return DataConfig(**{**defaults, **keys})


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample_members(seed: int, *, labelled: bool = True, height: int = HEIGHT, width: int = WIDTH) -> dict[str, bytes]:
    generator = np.random.default_rng(seed)
    members = {
        "png": png(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)),
        "json": json.dumps({"source": f"{seed}.png", "height": height, "width": width}).encode(),
    }
    if labelled:
        members["label.png"] = png(generator.choice(np.array([0, 1, 2, 255], np.uint8), (height, width)))
    return members


def write_shards(
    folder: Path,
    shards: list[list[dict[str, bytes]]],
    *,
    labelled: bool = True,
    classes: tuple[ClassInfo, ...] = CLASSES,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> Manifest:
    """One shard per list, one sample per dict of members; keys are `000-000`, shard and sample."""
    folder.mkdir(parents=True)
    written = []
    for number, samples in enumerate(shards):
        path = folder / f"shard-{number:06d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for index, members in enumerate(samples):
                writer.write({"__key__": f"{number:03d}-{index:03d}", **members})
        shard = index_shard(path, len(samples[0]) if samples else 0, labelled, len(classes), size)
        counts = [pixel_counts(members["label.png"], len(classes)) for members in samples if "label.png" in members]
        written.append(replace(shard, pixel_counts=counts) if len(counts) == len(samples) and labelled else shard)
    manifest = Manifest(folder, "test", 1, "all", labelled, classes, tuple(written))
    save_manifest(manifest)
    return manifest


def pixel_counts(label: bytes, classes: int) -> list[int]:
    ids = np.asarray(Image.open(io.BytesIO(label))).ravel()
    return [int(count) for count in np.bincount(ids, minlength=256)[:classes]]


def index_shard(path: Path, members: int, labelled: bool, classes: int, size: tuple[int, int]) -> Shard:
    """What the manifest says of a shard whose samples all have as many members."""
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
    firsts = infos[::members] if members else []
    offsets = [info.offset for info in firsts]
    ends = [info.offset_data + -(-info.size // 512) * 512 for info in infos[members - 1 :: members]] if members else []
    count = len(offsets)
    return Shard(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        keys=[info.name.split(".")[0] for info in firsts],
        offsets=offsets,
        lengths=[end - offset for offset, end in zip(offsets, ends, strict=True)],
        heights=[size[0]] * count,
        widths=[size[1]] * count,
        pixel_counts=[[0] * classes for _ in range(count)] if labelled else [],
    )


def make_shards(folder: Path, counts: list[int], *, labelled: bool = True) -> Manifest:
    """Shards of random images."""
    samples = [
        [sample_members(1000 * number + index, labelled=labelled) for index in range(count)]
        for number, count in enumerate(counts)
    ]
    return write_shards(folder, samples, labelled=labelled)


def with_keys(manifest: Manifest, keys: list[str]) -> Manifest:
    """The manifest with its only shard's samples called otherwise."""
    return replace(manifest, shards=(replace(manifest.shards[0], keys=keys),))


def stored_samples(manifest: Manifest) -> Iterator[dict[str, bytes]]:
    """Every sample, read by its place in the manifest alone."""
    for shard in manifest.shards:
        content = (manifest.folder / shard.name).read_bytes()
        for key, offset, length in zip(shard.keys, shard.offsets, shard.lengths, strict=True):
            with tarfile.open(fileobj=io.BytesIO(content[offset : offset + length] + bytes(1024))) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            assert all(name.startswith(f"{key}.") for name in members)
            yield {name.removeprefix(f"{key}."): content for name, content in members.items()}


def label_of(sample: dict[str, bytes]) -> list[list[int]]:
    """Train ids of a sample, row by row."""
    labels: list[list[int]] = np.asarray(Image.open(io.BytesIO(sample["label.png"]))).tolist()
    return labels
