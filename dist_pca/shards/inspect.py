"""Summarise a shard folder: statistics, and a picture of some samples with their labels."""

import io
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from dist_pca.shards.sample import (
    LABEL_FORMATS,
    decode_header,
    decode_image,
    decode_pixels,
    image_member,
    read_sample,
)

_TILE_WIDTH = 480
_TALLEST = 4 * _TILE_WIDTH
"""Height to which taller images are squeezed."""
_MARGIN = 8
_FONT_SIZE = 16
_LABEL_OPACITY = 0.55


@dataclass(frozen=True)
class ClassSummary:
    """Statistics of one class in a shard folder."""

    name: str
    color: tuple[int, int, int]
    pixels: int
    share: float
    """Share of all labelled pixels, without ignored ones; 0 to 1."""
    images: int
    """Number of images that contain the class."""


@dataclass(frozen=True)
class Summary:
    """Statistics of a shard folder."""

    folder: str
    recipe: str
    recipe_version: int
    split: str
    labelled: bool
    samples: int
    shards: int
    bytes: int
    smallest: tuple[int, int]
    """Width and height of the image with the fewest pixels."""
    largest: tuple[int, int]
    """Width and height of the image with the most pixels."""
    bands: int
    ignored_share: float | None
    """Share of all pixels that have no class; 0 to 1, None without labels."""
    classes: list[ClassSummary]


def summarise(manifest: Manifest) -> Summary:
    """Compute a shard folder's statistics from its manifest alone.

    Raises:
        UserError: the folder has no samples.
    """
    sizes = [size for shard in manifest.shards for size in zip(shard.widths, shard.heights, strict=True)]
    if not sizes:
        raise UserError(f"shards {manifest.folder}: contain no samples; build them from a folder with images")
    pixels = sum(width * height for width, height in sizes)
    rows = [row for shard in manifest.shards for row in shard.pixel_counts]
    totals = manifest.pixel_counts
    classes = [
        ClassSummary(
            name=info.name,
            color=info.color,
            pixels=totals[index],
            share=totals[index] / max(1, sum(totals)),
            images=sum(row[index] > 0 for row in rows),
        )
        for index, info in enumerate(manifest.classes)
    ]
    return Summary(
        folder=str(manifest.folder),
        recipe=manifest.recipe,
        recipe_version=manifest.recipe_version,
        split=manifest.split,
        labelled=manifest.labelled,
        samples=len(sizes),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        smallest=min(sizes, key=math.prod),
        largest=max(sizes, key=math.prod),
        bands=manifest.bands,
        ignored_share=1 - sum(totals) / pixels if manifest.labelled else None,
        classes=classes,
    )


def render(summary: Summary) -> Group:
    """Format a summary as tables for a terminal."""
    facts = Table(Column(style="bold"), Column(), show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("folder", Text(summary.folder))
    facts.add_row("recipe", Text(f"{summary.recipe}, version {summary.recipe_version}, split {summary.split}"))
    facts.add_row("samples", f"{summary.samples:,}{'' if summary.labelled else ', without labels'}")
    facts.add_row("shards", f"{summary.shards:,}, {summary.bytes / 1e6:,.1f} MB")
    facts.add_row("image size", _sizes(summary))
    if summary.bands != 3:
        facts.add_row("bands", f"{summary.bands}")
    if summary.ignored_share is not None:
        facts.add_row("ignored", f"{summary.ignored_share:.1%} of all pixels")
    return Group(facts, _class_table(summary)) if summary.classes else Group(facts)


def _sizes(summary: Summary) -> str:
    smallest, largest = (f"{width} x {height}" for width, height in (summary.smallest, summary.largest))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _class_table(summary: Summary) -> Table:
    table = Table(Column("id", justify="right"), "class", title_justify="left")
    if summary.labelled:
        table.add_column("share of pixels", justify="right")
        table.add_column("images with it", justify="right")
    for index, info in enumerate(summary.classes):
        name = Text.assemble(("  ", f"on rgb({','.join(map(str, info.color))})"), " ", info.name)
        counts = (f"{info.share:.2%}", f"{info.images:,}") if summary.labelled else ()
        table.add_row(str(index), name, *counts)
    return table


def grid(manifest: Manifest, samples: int = 12) -> Image.Image:
    """Draw samples spread evenly over the folder, with labels overlaid in the classes' colours, and a legend."""
    places = [(shard, index) for shard in manifest.shards for index in range(len(shard.keys))]
    chosen = [places[round(k)] for k in np.linspace(0, len(places) - 1, min(samples, len(places)))]
    tiles = [_tile(manifest, read_sample(manifest, shard, index)) for shard, index in chosen]
    columns = min(len(tiles), max(1, round(math.sqrt(len(tiles) * 4 / 3))))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = columns * (_TILE_WIDTH + _MARGIN) + _MARGIN
    legend = _legend(manifest.classes, width) if manifest.labelled else Image.new("RGB", (width, 0))
    heights = [max(tile.height for tile in row) + _MARGIN for row in rows]
    picture = Image.new("RGB", (width, sum(heights) + _MARGIN + legend.height), "white")
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            picture.paste(tile, (_MARGIN + column * (_TILE_WIDTH + _MARGIN), top))
        top += height
    picture.paste(legend, (0, top))
    return picture


def save_grid(manifest: Manifest, path: Path, samples: int = 12) -> None:
    """Write `grid` to an image file.

    Raises:
        UserError: the file cannot be written, or its extension is not that of an image format.
    """
    try:
        grid(manifest, samples).save(path)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"grid {path}: not written ({error}); give a .png file in a folder that exists") from error


def _tile(manifest: Manifest, members: dict[str, bytes]) -> Image.Image:
    extension = image_member(members, manifest.label_member, manifest.image_member)
    image = decode_image(members[extension], extension).convert("RGB")
    size = (_TILE_WIDTH, min(max(1, round(image.height * _TILE_WIDTH / image.width)), _TALLEST))
    image = image.resize(size, Image.Resampling.BILINEAR)
    if manifest.label_member not in members:
        return image
    ids = decode_pixels(decode_header(io.BytesIO(members[manifest.label_member]), LABEL_FORMATS))
    label = np.asarray(ids.resize(size, Image.Resampling.NEAREST))
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(manifest.classes)] = [info.color for info in manifest.classes]
    blended = Image.blend(image, Image.fromarray(palette[label]), _LABEL_OPACITY)
    return Image.composite(image, blended, Image.fromarray(label == IGNORE_INDEX))


def _legend(classes: tuple[ClassInfo, ...], width: int) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + _MARGIN
    entry = line + _MARGIN * 2 + math.ceil(max(font.getlength(info.name) for info in classes))
    columns = max(1, (width - _MARGIN) // entry)
    legend = Image.new("RGB", (width, line * math.ceil(len(classes) / columns) + _MARGIN), "white")
    draw = ImageDraw.Draw(legend)
    for index, info in enumerate(classes):
        left, top = _MARGIN + index % columns * entry, index // columns * line
        draw.rectangle((left, top, left + _FONT_SIZE, top + _FONT_SIZE), fill=info.color)
        draw.text((left + line, top - 1), info.name, fill="black", font=font)
    return legend
