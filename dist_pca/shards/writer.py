"""Writing one shard: samples into a WebDataset tar, byte for byte the same wherever and whenever it is written."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.images import Encoding, encode_image, open_image, stored_size
from dist_pca.shards.labels import TrainIds, encode_label, lookup_table, read_label
from dist_pca.shards.manifest import Shard, file_sha256
from dist_pca.shards.recipe import Coding
from dist_pca.shards.scan import RawSample


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, complete enough to be sent to another process."""

    path: Path
    root: Path
    samples: tuple[RawSample, ...]
    coding: Coding
    classes: tuple[ClassInfo, ...]
    encoding: Encoding


def write_shard(job: ShardJob, report: Callable[[int], None]) -> Shard:
    """Write a shard and sync it to disk.

    Args:
        job: What to write, and where.
        report: Called after each sample with the bytes that it takes in the tar; may raise to stop.

    Raises:
        UserError: an image or label is damaged, or they do not fit together.
        OSError: the disk does not take the shard.
    """
    # Imported here because webdataset brings torch with it, which only processes that write need to wait for.
    from webdataset import TarWriter

    table = lookup_table(job.coding, job.classes)
    offsets, lengths, sizes, pixel_counts = [], [], [], []
    with job.path.open("wb") as file:
        with TarWriter(file, encoder=False, user="root", group="root", mode=0o644, mtime=0) as writer:
            for raw in job.samples:
                members, size, train_ids = _encode(job, raw, table)
                offset = writer.tarstream.offset
                writer.write({"__key__": raw.key, **members})
                offsets.append(offset)
                lengths.append(writer.tarstream.offset - offset)
                sizes.append(size)
                if train_ids is not None:
                    counts = np.bincount(train_ids.ravel(), minlength=256)
                    pixel_counts.append(counts[: len(job.classes)].tolist())
                report(lengths[-1])
        file.flush()
        os.fsync(file.fileno())
    return Shard(
        name=job.path.name,
        bytes=job.path.stat().st_size,
        sha256=file_sha256(job.path),
        keys=[raw.key for raw in job.samples],
        offsets=offsets,
        lengths=lengths,
        heights=[height for _, height in sizes],
        widths=[width for width, _ in sizes],
        pixel_counts=pixel_counts,
    )


def _encode(
    job: ShardJob, raw: RawSample, table: TrainIds
) -> tuple[dict[str, bytes], tuple[int, int], TrainIds | None]:
    """A sample's members by extension, its stored (width, height), and its labels if it has any."""
    path = job.root / raw.image
    image = open_image(path)
    size = stored_size(image, job.encoding)
    extension, encoded = encode_image(path, image, job.encoding)
    description = {"source": raw.image, "height": size[1], "width": size[0]}
    members = {extension: encoded, "json": json.dumps(description).encode()}
    if raw.label is None:
        return members, size, None
    train_ids = read_label(job.root / raw.label, job.coding, table)
    height, width = train_ids.shape
    if (width, height) != image.size:
        raise UserError(
            f"{job.root / raw.label}: {width} x {height} pixels where its image {raw.image} has "
            f"{image.width} x {image.height}; give labels of the image's size or leave both out with --exclude"
        )
    if size != image.size:
        train_ids = np.asarray(Image.fromarray(train_ids).resize(size, Image.Resampling.NEAREST))
    members["label.png"] = encode_label(train_ids)
    return members, size, train_ids
