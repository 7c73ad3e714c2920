"""Write one shard, a WebDataset tar whose bytes do not depend on when and where it is written."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from dist_pca.classes import IGNORE_INDEX
from dist_pca.errors import UserError
from dist_pca.files import PART, file_sha256, write_whole
from dist_pca.shards.bands import Picture
from dist_pca.shards.images import Reading, describe_file, encode_image, open_image, stored_size, tile_boxes
from dist_pca.shards.labels import Table, TrainIds, encode_label, label_table, read_train_ids
from dist_pca.shards.manifest import Shard
from dist_pca.shards.plan import Plan
from dist_pca.shards.pool import Report
from dist_pca.shards.recipe import Recipe
from dist_pca.shards.sample import MAX_PIXELS
from dist_pca.shards.scan import RawSample


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, with everything that a worker process needs."""

    path: Path
    """Path of the tar; its description is written beside it, as `.json`."""
    name: str
    """Final name of the shard."""
    plan: Plan
    """The build, with the samples of this shard alone."""


@dataclass(frozen=True)
class Skipped:
    """A sample that was skipped."""

    image: str
    """Path relative to the root."""
    reason: str


@dataclass(frozen=True)
class Written:
    """Description of a shard that is completely written."""

    shard: Shard
    skipped: tuple[Skipped, ...]


_ADAPTER = TypeAdapter(Written)


def write_shard(job: ShardJob, report: Report) -> None:
    """Write a shard and then its description, each synced under a temporary name and renamed.

    Args:
        job: The shard to write.
        report: Called after each sample with its size in the tar.

    Raises:
        UserError: an image or label is damaged, or they do not fit together, and such samples are not to be skipped.
        OSError: the shard cannot be written to disk.
    """
    part = job.path.with_name(f"{job.path.stem}.{uuid4().hex}{PART}")
    try:
        written = _write(job.plan, job.name, part, report)
        part.replace(job.path)
    finally:
        part.unlink(missing_ok=True)
    text = _ADAPTER.dump_json(written).decode()
    write_whole(job.path.with_suffix(".json"), text)


def read_written(path: Path) -> Written | None:
    """Read the description of the shard at `path`; None if the shard was never finished."""
    try:
        written = _ADAPTER.validate_json(path.with_suffix(".json").read_bytes())
        return written if path.stat().st_size == written.shard.bytes else None
    except (FileNotFoundError, ValidationError):
        return None


def _write(plan: Plan, name: str, part: Path, report: Report) -> Written:
    # Imported here because webdataset imports torch, and only processes that write shards should wait for it.
    from webdataset import TarWriter

    table = label_table(plan.recipe.coding, plan.classes)
    shard = Shard(name, 0, "", [], [], [], [], [], [])
    skipped = []
    with part.open("wb") as file:
        with TarWriter(file, encoder=False, user="root", group="root", mode=0o644, mtime=0) as writer:
            for raw in plan.samples:
                try:
                    image, train_ids = open_image(plan.root / raw.image, plan.recipe.reading, plan.max_pixels), None
                    if raw.label is not None:
                        train_ids = read_label_of(image, plan.root, raw, plan.recipe, table, plan.max_pixels)
                    _check_stored_size(plan, raw, image)
                except UserError as error:
                    if plan.on_error == "fail":
                        raise
                    skipped.append(Skipped(_printable(raw.image), _printable(_reason(error, plan.root, raw))))
                    report(1, 0)
                    continue
                start = writer.tarstream.offset
                for key, members, (width, height), stored_ids in _encoded(plan, raw, image, train_ids):
                    offset = writer.tarstream.offset
                    writer.write({"__key__": key, **members})
                    shard.keys.append(key)
                    shard.offsets.append(offset)
                    shard.lengths.append(writer.tarstream.offset - offset)
                    shard.heights.append(height)
                    shard.widths.append(width)
                    if stored_ids is not None:
                        shard.pixel_counts.append(Image.fromarray(stored_ids).histogram()[: len(plan.classes)])
                report(1, writer.tarstream.offset - start)
        file.flush()
        os.fsync(file.fileno())
    return Written(replace(shard, bytes=part.stat().st_size, sha256=file_sha256(part)), tuple(skipped))


def _reason(error: UserError, root: Path, raw: RawSample) -> str:
    # Remove the root, so that the report does not depend on it, and the remedy, which no longer applies.
    return str(error).replace(f"{root}/", "").removeprefix(f"{raw.image}: ").partition("; ")[0]


def _printable(text: str) -> str:
    """Escape the bytes of file names that are not UTF-8, which JSON cannot hold."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def read_label_of(
    image: Picture, root: Path, raw: RawSample, recipe: Recipe, table: Table, max_pixels: int
) -> TrainIds:
    """Read the train ids (height x width) of a sample with a label, whose upright image has been read.

    Raises:
        UserError: as in `read_train_ids`, or the label has another size than the image.
    """
    train_ids = read_train_ids(root, raw, recipe.coding, table, image.size, max_pixels)
    height, width = train_ids.shape
    if (width, height) != image.size:
        raise UserError(
            f"{root / str(raw.label)}: {width} x {height} pixels where its image {raw.image} has {image.width} x "
            f"{image.height}{_size_remedy(root / raw.image, image, (width, height), recipe.reading, max_pixels)}"
        )
    return train_ids


def _encoded(
    plan: Plan, raw: RawSample, image: Picture, train_ids: TrainIds | None
) -> Iterator[tuple[str, dict[str, bytes], tuple[int, int], TrainIds | None]]:
    """Key, members by extension, stored (width, height) and labels of an image, or of each of its tiles."""
    tiled = plan.encoding.tile is not None
    for number, box in enumerate(tile_boxes(image.size, plan.encoding)):
        part = image.crop(box) if tiled else image
        ids = train_ids[box[1] : box[3], box[0] : box[2]] if tiled and train_ids is not None else train_ids
        if tiled and _is_empty(part, ids):
            continue
        size = stored_size(part, plan.encoding)
        extension, encoded = encode_image(plan.root / raw.image, part, plan.encoding)
        description = {"source": raw.image, "height": size[1], "width": size[0]}
        if tiled:
            description |= {"top": box[1], "left": box[0]}
        members = {extension: encoded, "json": json.dumps(description).encode()}
        if ids is not None:
            if size != part.size:
                ids = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
            members["label.png"] = encode_label(ids)
        yield f"{raw.key}_{number}" if tiled else raw.key, members, size, ids


def _is_empty(tile: Picture, train_ids: TrainIds | None) -> bool:
    if train_ids is not None:
        return bool((train_ids == IGNORE_INDEX).all())
    return all(low == high for low, high in zip(*[iter(np.ravel(tile.getextrema()))] * 2, strict=True))


def _check_stored_size(plan: Plan, raw: RawSample, image: Picture) -> None:
    width, height = stored_size(image, plan.encoding)
    if plan.encoding.tile is None and width * height > MAX_PIXELS:
        raise UserError(
            f"{plan.root / raw.image}: {width * height:,} pixels, and shards hold up to {MAX_PIXELS:,}; cut images "
            "with --tile or shrink them with --max-edge"
        )


def _size_remedy(path: Path, image: Picture, label_size: tuple[int, int], reading: Reading, max_pixels: int) -> str:
    _, tag = describe_file(path, reading, max_pixels)
    if tag >= 5 and label_size == image.size[::-1]:
        return (
            f" once its EXIF orientation, {tag}, turns it upright, which labels keep to; turn the label likewise, or "
            "remove the orientation from the image if it is wrong"
        )
    return "; give labels of the image's size or leave both out with --exclude"
