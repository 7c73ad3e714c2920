"""The plan of a build, made before anything is written: samples, their split into shards, and their encoding.

A digest identifies a plan: two plans with the same digest write the same bytes.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Unpack

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.images import Encoding, ImageFormat
from dist_pca.shards.recipe import DRAWN_KEYS, DRAWN_KINDS, Recipe, load_recipe
from dist_pca.shards.sample import MAX_PIXELS
from dist_pca.shards.scan import RawSample, Selection, scan

_log = logging.getLogger("dist_pca.shards")
BUILDER_VERSION = 2
"""Part of every digest; increase it whenever the same raw files and options give other bytes."""

SAMPLES_PER_SHARD = 256
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("IB", 1024))
}

OnError = Literal["fail", "skip"]


class PlanOptions(Selection, total=False):
    """Options of `make_plan`, documented there."""

    split: str | None
    image_format: ImageFormat
    quality: int
    max_edge: int | None
    tile: tuple[int, int] | None
    overlap: int
    max_pixels: int
    samples_per_shard: int | None
    shard_size: int | None
    on_error: OnError


@dataclass(frozen=True)
class Plan:
    """The plan of a build."""

    recipe: Recipe
    root: Path
    split: str
    samples: tuple[RawSample, ...]
    sizes: tuple[tuple[int | None, int | None], ...]
    """Bytes of each sample's raw image and label (of its part of a COCO file); None if there is no such file."""
    classes: tuple[ClassInfo, ...]
    encoding: Encoding
    samples_per_shard: int | None
    shard_size: int | None
    """Largest number of raw bytes in a shard; None if shards are split by number of samples."""
    on_error: OnError
    max_pixels: int = MAX_PIXELS

    @property
    def labelled(self) -> bool:
        """Whether samples have labels."""
        return self.samples[0].label is not None

    @cached_property
    def shards(self) -> list[slice]:
        """Samples of each shard."""
        if self.samples_per_shard is not None:
            starts = [*range(0, len(self.samples), self.samples_per_shard)]
        else:
            starts = _starts([raw_bytes(sizes) for sizes in self.sizes], self.shard_size or 1)
        return [slice(*bounds) for bounds in zip(starts, [*starts[1:], len(self.samples)], strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the recipe, the options and the names and sizes of the raw files."""
        options = self._options() | {"samples_per_shard": self.samples_per_shard}
        if self.shard_size is not None:
            options["shard_size"] = self.shard_size
        if self.on_error == "skip":
            options["on_error"] = self.on_error
        return self._digest(options, slice(None))

    @cached_property
    def shard_digests(self) -> list[str]:
        """Digest of everything that each shard's bytes depend on, independent of the other shards."""
        return [self._digest(self._options(), shard) for shard in self.shards]

    def _options(self) -> dict[str, Any]:
        # Keys that have no effect on a build must not make it another.
        idle: dict[str, Any] = {} if self.recipe.coding.kind in DRAWN_KINDS else {"coding": set(DRAWN_KEYS)}
        idle |= {"bands": True} if self.recipe.bands is None else {}
        # It shows in the samples.
        idle |= {"splits": {"__all__": {"exclude"}}}
        return {
            "builder": BUILDER_VERSION,
            "recipe": self.recipe.model_dump(mode="json", exclude={"description": True} | idle),
            "classes": [asdict(info) for info in self.classes],
            "split": self.split,
            "encoding": asdict(self.encoding),
        }

    def _digest(self, options: dict[str, Any], part: slice) -> str:
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        for sample, sizes in zip(self.samples[part], self.sizes[part], strict=True):
            for name, size in zip((sample.image, sample.label), sizes, strict=True):
                digest.update(json.dumps([name, size]).encode())
            if sample.coco is not None:
                digest.update(sample.coco.digest.encode())
        return digest.hexdigest()


def make_plan(
    recipe: Recipe | str | Path,
    root: str | Path,
    *,
    split: str | None = None,
    image_format: ImageFormat = "keep",
    quality: int = 90,
    max_edge: int | None = None,
    tile: tuple[int, int] | None = None,
    overlap: int = 0,
    max_pixels: int = MAX_PIXELS,
    samples_per_shard: int | None = None,
    shard_size: int | None = None,
    on_error: OnError = "fail",
    **selection: Unpack[Selection],
) -> Plan:
    """Plan a build from a raw data set's file names and sizes; writes nothing.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        split: One of the recipe's splits; None if it has only one.
        image_format: `keep` stores JPEG, PNG and WebP files byte for byte and others as PNG.
        quality: Quality of images that are encoded as JPEG or WebP, 1 to 100.
        max_edge: Images with a longer edge (pixels) are shrunk to it, labels by nearest neighbour.
        tile: Height and width of tiles, each of which becomes a sample; those without a labelled pixel, or without
            labels those of one colour, are left out. None stores whole images.
        overlap: Pixels that neighbouring tiles share.
        max_pixels: Larger images are an error; what is stored must not exceed `MAX_PIXELS`.
        samples_per_shard: Samples in each shard but the last; None is 256, or as many as fit in `shard_size`.
        shard_size: Split by size instead: a shard has as many samples as fit in so many raw bytes, at least one.
        on_error: Whether a sample that cannot be stored stops the build or is skipped and reported.
        selection: Options of `scan`.

    Raises:
        UserError: the recipe, the root or the selection is wrong, labels are missing, or both `samples_per_shard` and
            `shard_size` are given, or both `tile` and `max_edge`.
    """
    if tile is not None and (max_edge is not None or not 0 <= overlap < min(tile)):
        raise UserError(
            f"--tile {tile[0]} {tile[1]} --overlap {overlap}: give an overlap below the tile's edges, and no --max-edge"
        )
    if tile is None and overlap:
        raise UserError(f"--overlap {overlap}: has no effect without --tile; add it")
    if samples_per_shard is not None and shard_size is not None:
        raise UserError("--samples-per-shard and --shard-size both set the size of shards; give only one of them")
    if samples_per_shard is None and shard_size is None:
        samples_per_shard = SAMPLES_PER_SHARD
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if image_format != "keep" and recipe.reading.count != 3:
        raise UserError(
            f"--image-format {image_format}: images of {recipe.reading.count} bands are stored as arrays; leave the "
            "option out"
        )
    root = Path(root)
    split = recipe.split(split)
    found = scan(recipe, root, split, need_labels=on_error == "fail", **selection)
    if found.passed_over:
        _log.warning("root %s: passed over %s", root, found.passed_over)
    samples = found.samples
    return Plan(
        recipe=recipe,
        root=root,
        split=split,
        samples=samples,
        sizes=tuple(
            (_size(root, raw.image), _size(root, raw.label) if raw.coco is None else raw.coco.bytes) for raw in samples
        ),
        classes=recipe.class_table(root, required=samples[0].label is not None),
        encoding=Encoding(image_format, quality, max_edge, tile, overlap),
        max_pixels=max_pixels,
        samples_per_shard=samples_per_shard,
        shard_size=shard_size,
        on_error=on_error,
    )


def raw_bytes(sizes: tuple[int | None, int | None]) -> int:
    """Bytes of a sample's raw files."""
    return sum(size or 0 for size in sizes)


def parse_bytes(text: str) -> int:
    """Parse a number of bytes such as 256MB, 1.5 GiB or 1000000.

    Raises:
        UserError: the text has another form, or is less than one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise UserError(f"--shard-size {text!r}: give a size such as 256MB, 1GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _size(root: Path, name: str | None) -> int | None:
    try:
        return None if name is None else (root / name).stat().st_size
    except FileNotFoundError:
        return None


def _starts(sizes: Sequence[int], limit: int) -> list[int]:
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled and filled + size > limit:
            starts.append(index)
            filled = 0
        filled += size
    return starts
