"""The manifest of a shard folder: contents and checksum of each shard, and the byte offset of each sample."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.files import write_whole
from dist_pca.shards.bands import MAX_BANDS

MANIFEST_NAME = "manifest.json"
FORMAT = "dist-pca-shards"
VERSION = 2
"""Version of folders whose images have other than three bands; others are written as version 1, as by 0.1."""
MAX_SAMPLE_BYTES = 1 << 31
"""Largest sample in a shard: samples are read whole."""
_LONGEST_NAME = 255
"""Bytes that file systems allow in a name."""


@dataclass(frozen=True)
class Shard:
    """One tar file and its samples, in columns, in stored order."""

    name: str
    """File name inside the shard folder."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of the file, in hexadecimal."""
    keys: list[str]
    """WebDataset key of each sample, unique in the folder."""
    offsets: list[int]
    """Byte offset of each sample's first tar header."""
    lengths: list[int]
    """Bytes from there to the end of the sample's last member, padded to 512; the slice is a tar of the sample."""
    heights: list[int]
    """Image height in pixels."""
    widths: list[int]
    """Image width in pixels."""
    pixel_counts: list[list[int]]
    """Labelled pixels per sample and class (samples x classes); empty without labels."""


@dataclass(frozen=True)
class Manifest:
    """Description of a shard folder; read without opening any shard."""

    folder: Path
    """Local folder of the shards; not stored."""
    recipe: str
    recipe_version: int
    split: str
    labelled: bool
    classes: tuple[ClassInfo, ...]
    """Classes by train id."""
    shards: tuple[Shard, ...]
    fingerprint: str = ""
    """Digest of the inputs of the build (recipe, options, raw file names and sizes)."""
    label_member: str = "label.png"
    """Extension of the members that hold labels."""
    image_member: str | None = None
    """Extension of the members that hold images; None is any that images usually have."""
    bands: int = 3
    """Bands of every image."""
    location: str = field(default="", compare=False, repr=False)
    """Origin of the shards, a path or a URL; not stored. Files of a URL are downloaded into the folder."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(len(shard.keys) for shard in self.shards)

    @property
    def pixel_counts(self) -> list[int]:
        """Labelled pixels per class in all shards; zeros without labels."""
        rows = (row for shard in self.shards for row in shard.pixel_counts)
        return [sum(column) for column in zip(*rows, strict=True)] or [0] * len(self.classes)


_ADAPTER = TypeAdapter(Manifest)


def load_manifest(folder: str | Path, *, location: str | None = None, check_files: bool = True) -> Manifest:
    """Read a shard folder's manifest and check it against the files' names and sizes (not their checksums).

    Args:
        folder: The folder that holds the manifest.
        location: URL from which it was downloaded; None is the folder itself.
        check_files: Whether the shards must be in the folder.

    Raises:
        UserError: the folder or its manifest is missing, is not JSON, was written in another format version or is
            inconsistent, or a shard that it lists is missing or has another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(
            f"shards {folder}: no such folder; create it with `dist-pca shards build`, or give the one that has yours"
        )
    if not path.is_file():
        raise UserError(
            f"shards {folder}: no {MANIFEST_NAME} in it; build shards with `dist-pca shards build`, "
            "or index existing shards with `dist-pca shards index`"
        )
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); build the shards again with --force") from error
    _check_format(path, raw)
    try:
        manifest = _ADAPTER.validate_python({**raw, "folder": folder, "location": location or str(folder)})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg']}; build the shards again with --force") from None
    if not 1 <= manifest.bands <= MAX_BANDS:
        raise UserError(f"{path}: bands: not from 1 to {MAX_BANDS}; build the shards again with --force")
    for shard in manifest.shards:
        _check_columns(manifest, shard)
        if check_files:
            _check_file(manifest, shard)
    return manifest


def save_manifest(manifest: Manifest, part_folder: Path | None = None) -> None:
    """Write the manifest into its folder, atomically; `part_folder` as for `write_whole`."""
    content = {"format": FORMAT, "version": 1 if manifest.bands == 3 else VERSION} | _ADAPTER.dump_python(
        manifest, mode="json", exclude={"folder", "location"}
    )
    if manifest.image_member is None:
        del content["image_member"]
    if manifest.bands == 3:
        del content["bands"]
    write_whole(manifest.folder / MANIFEST_NAME, json.dumps(content, separators=(",", ":")), part_folder)


def shards_digest(manifest: Manifest) -> str:
    """SHA-256 over the checksums of all shards in order: equal for the same samples in the same order, wherever."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()


def describe_empty_classes(manifest: Manifest) -> str:
    """Warning that names the classes of which no label has a pixel; empty if there are none, or no labels.

    Raises:
        UserError: no label has a pixel of any class.
    """
    counts = manifest.pixel_counts
    empty = [info.name for info, count in zip(manifest.classes, counts, strict=True) if count == 0]
    if not manifest.labelled or not manifest.samples or not empty:
        return ""
    where = f"shards {manifest.location or manifest.folder}"
    if not any(counts):
        raise UserError(
            f"{where}: no label has a pixel of any class, all {manifest.samples:,} are ignored; write in the recipe's "
            "coding what their values mean"
        )
    pixels = sum(h * w for shard in manifest.shards for h, w in zip(shard.heights, shard.widths, strict=True))
    remedy = "check that their values mean what the coding says"
    if counts[0] and not any(counts[1:]) and counts[0] < pixels:
        first, second = (info.name for info in manifest.classes[:2])
        remedy = (
            f"all pixels are {first} or ignored, as if masks of 0 and 255 were read as train ids: if 255 is {second}, "
            f"write `ids: {{0: {first}, 255: {second}}}` in the coding of a recipe of your own (start from `dist-pca "
            "shards recipes folder`) and build again"
        )
    return f"{where}: no label has a pixel of {', '.join(empty)}; {remedy}"


def _check_format(path: Path, raw: Any) -> None:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of dist-pca shards; create one with `dist-pca shards build`")
    if raw.get("version") not in (1, VERSION):
        raise UserError(
            f"{path}: has format version {json.dumps(raw.get('version'))[:40]}, but this dist-pca reads versions up "
            f"to {VERSION}; build the shards again with --force or install the dist-pca version that built them"
        )


def _check_file(manifest: Manifest, shard: Shard) -> None:
    path = manifest.folder / shard.name
    if not path.is_file():
        raise UserError(f"{path}: listed in {MANIFEST_NAME} but missing; copy it back or build again with --force")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(
            f"{path}: {size} bytes, {MANIFEST_NAME} lists {shard.bytes}; copy it again or build again with --force"
        )


def _check_columns(manifest: Manifest, shard: Shard) -> None:
    if Path(shard.name).name != shard.name:
        raise UserError(f"{manifest.folder / MANIFEST_NAME}: shard name {shard.name[:80]!r} is outside the folder")
    if not shard.name.isprintable() or len(os.fsencode(shard.name)) > _LONGEST_NAME:
        raise UserError(
            f"{manifest.folder / MANIFEST_NAME}: shard name {shard.name[:80]!r} is not the name of a file; build the "
            "shards again with --force"
        )
    samples = len(shard.keys)
    columns = [shard.offsets, shard.lengths, shard.heights, shard.widths]
    if manifest.labelled:
        columns.append([len(row) for row in shard.pixel_counts if len(row) == len(manifest.classes)])
    if any(len(column) != samples for column in columns):
        raise UserError(
            f"{manifest.folder / MANIFEST_NAME}: {shard.name}: columns differ in length from {samples} samples; "
            "build the shards again with --force"
        )
    for key, offset, length in zip(shard.keys, shard.offsets, shard.lengths, strict=True):
        if not 0 <= offset < offset + length <= shard.bytes:
            raise UserError(
                f"{manifest.folder / MANIFEST_NAME}: {shard.name}: sample {key!r} is outside the file; "
                "build the shards again with --force"
            )
        if length > MAX_SAMPLE_BYTES:
            raise UserError(
                f"{manifest.folder / MANIFEST_NAME}: {shard.name}: sample {key!r} has {length:,} bytes, and samples "
                f"are read whole, up to {MAX_SAMPLE_BYTES:,}; write the shard again with smaller samples"
            )
