"""Matches drawn as lines between source and target crops."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dist_pca.association.sampling import class_balanced
from dist_pca.classes import ClassInfo
from dist_pca.data.collate import Batch
from dist_pca.evaluation.cycles import JudgedCycles
from dist_pca.evaluation.pictures import legend_picture
from dist_pca.objective.domains import IGNORE_INDEX
from dist_pca.shards.bands import shown

CORRECT, WRONG, UNJUDGED = (0, 205, 90), (240, 40, 40), (200, 200, 200)
"""Colours of lines to target pixels of the source's class, of another class, and of none."""
LINES = 60
"""Matches drawn in one picture."""
_CELL_WIDTH = 560
_GAP = 8
_MIDDLE = 120
_LINE = 26
_FONT_SIZE = 17
_SCALE = 2
"""Drawn this much larger and reduced, which smooths the lines."""
Point = tuple[float, float]


def save_pictures(
    folder: Path,
    title: str,
    level: str,
    batches: Sequence[tuple[Batch, Batch]],
    judged: Sequence[Sequence[JudgedCycles]],
    classes: Sequence[ClassInfo],
    *,
    most: int,
) -> None:
    """Write `matches-LEVEL-N.png` of the first candidate sets, N from 1.

    Args:
        folder: Made where it is missing.
        title: What the pictures show.
        level: For their names.
        batches: Crops of source and target.
        judged: Candidate sets of each batch: as many as it has pairs of images, or one.
        classes: The run's.
        most: Most pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = [
        (source.images[images], target.images[images], cycles)
        for (source, target), of_batch in zip(batches, judged, strict=True)
        for images, cycles in zip(_shares(len(source.images), len(of_batch)), of_batch, strict=True)
    ]
    for number, (sources, targets, cycles) in enumerate(sets[:most], 1):
        picture = matches_picture(sources, targets, cycles, classes, title=title, seed=number)
        picture.save(folder / f"matches-{level}-{number}.png")


def _shares(images: int, sets: int) -> list[slice]:
    return [slice(first, first + images // sets) for first in range(0, images, images // sets)]


def matches_picture(
    sources: torch.Tensor,
    targets: torch.Tensor,
    cycles: JudgedCycles,
    classes: Sequence[ClassInfo],
    *,
    title: str,
    seed: int,
) -> Image.Image:
    """Draw a random sample of a candidate set's matches, spread over the source's classes.

    A thick line is a kept cycle, a thin one a consistent cycle that the teacher refuses, a dashed one a cycle that is
    not consistent. Dots are in the colour of the source pixel's class, and of the target pixel's true class.

    Args:
        sources: uint8 [m, C, H, W], the candidate set's source crops, shown on the left from top to bottom.
        targets: uint8 [m, C, H', W'], its target crops, on the right.
        cycles: The candidate set's cycles.
        classes: The run's.
        title: What is shown; counts are added.
        seed: Same seed, same sample.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    heights = [round(_CELL_WIDTH * images.shape[2] / images.shape[3]) for images in (sources, targets)]
    lefts = [_GAP, _GAP + _CELL_WIDTH + _MIDDLE]
    width = lefts[1] + _CELL_WIDTH + _GAP
    top = _GAP + 2 * _LINE
    bottom = top + len(sources) * (max(heights) + _GAP)
    large = Image.new("RGB", (width * _SCALE, bottom * _SCALE), "white")
    for images, left, height in zip((sources, targets), lefts, heights, strict=True):
        for place, image in enumerate(images):
            crop = Image.fromarray(np.ascontiguousarray(shown(image.permute(1, 2, 0).cpu().numpy())))
            crop = crop.resize((_CELL_WIDTH * _SCALE, height * _SCALE), Image.Resampling.BICUBIC)
            # A little paler, so that lines and dots stand out.
            crop = Image.blend(crop, Image.new("RGB", crop.size, "white"), 0.2)
            large.paste(crop, (left * _SCALE, (top + place * (max(heights) + _GAP)) * _SCALE))

    def point(pixel: int, grid: tuple[int, int], side: int) -> Point:
        image, cell = divmod(pixel, grid[0] * grid[1])
        row, column = divmod(cell, grid[1])
        return (
            lefts[side] + (column + 0.5) / grid[1] * _CELL_WIDTH,
            top + image * (max(heights) + _GAP) + (row + 0.5) / grid[0] * heights[side],
        )

    drawn = class_balanced(cycles.labels, LINES, IGNORE_INDEX, seed)
    drawn = drawn[cycles.labels[drawn] != IGNORE_INDEX]
    dots: list[tuple[Point, int]] = []
    draw = ImageDraw.Draw(large)
    # Kept ones last, on top of the others.
    order = cycles.kept.long() + cycles.consistent.long()
    for pixel in drawn[order[drawn].argsort(stable=True)].tolist():
        target = int(cycles.targets[pixel])
        label, truth = int(cycles.labels[pixel]), int(cycles.target_labels[target])
        ends = point(pixel, cycles.source_grid, 0), point(target, cycles.target_grid, 1)
        color = UNJUDGED if truth == IGNORE_INDEX else CORRECT if truth == label else WRONG
        _draw_line(draw, ends, color, thick=bool(cycles.kept[pixel]), dashed=not cycles.consistent[pixel])
        dots += zip(ends, (label, truth), strict=True)
    for end, train_id in dots:
        _draw_dot(draw, end, (0, 0, 0) if train_id == IGNORE_INDEX else classes[train_id].color)
    picture = large.reduce(_SCALE)
    _write_heading(ImageDraw.Draw(picture), f"{title}: {_counts(cycles, len(drawn))}", font)
    legend = legend_picture(classes, width, font)
    whole = Image.new("RGB", (width, bottom + legend.height), "white")
    whole.paste(picture, (0, 0))
    whole.paste(legend, (0, bottom))
    return whole


def _counts(cycles: JudgedCycles, drawn: int) -> str:
    labelled = cycles.labels != IGNORE_INDEX
    judged = cycles.truth != IGNORE_INDEX
    parts = [f"{drawn} of {int(labelled.sum()):,} matches drawn"]
    for name, chosen in (("all", labelled), ("kept", cycles.kept)):
        right = cycles.correct[chosen & judged].double().mean()
        parts.append(f"{name} {int(chosen.sum()):,}" + ("" if right.isnan() else f", {100 * float(right):.0f} % right"))
    return "; ".join(parts)


def _write_heading(draw: ImageDraw.ImageDraw, title: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    draw.text((_GAP, _GAP + _LINE / 2), title, "black", font, anchor="lm")
    left, middle = float(_GAP), _GAP + 1.5 * _LINE
    for name, color, thick, dashed in (
        ("right", CORRECT, True, False),
        ("wrong class", WRONG, True, False),
        ("refused by the teacher", (90, 90, 90), False, False),
        ("not consistent", (90, 90, 90), False, True),
        ("no label", UNJUDGED, True, False),
    ):
        _draw_line(draw, ((left, middle), (left + 44, middle)), color, thick=thick, dashed=dashed, scale=1)
        draw.text((left + 50, middle), name, "black", font, anchor="lm")
        left += 50 + font.getlength(name) + 3 * _GAP


def _draw_line(
    draw: ImageDraw.ImageDraw,
    ends: tuple[Point, Point],
    color: tuple[int, int, int],
    *,
    thick: bool,
    dashed: bool,
    scale: int = _SCALE,
) -> None:
    (x, y), (to_x, to_y) = ((scale * end[0], scale * end[1]) for end in ends)
    width = scale * (3 if thick else 2 if not dashed else 1)
    dashes = max(1, round(float(np.hypot(to_x - x, to_y - y)) / (14 * scale))) if dashed else 1
    filled = 0.55 if dashed else 1.0
    for dash in range(dashes):
        start, end = dash / dashes, (dash + filled) / dashes
        segment = (x + start * (to_x - x), y + start * (to_y - y), x + end * (to_x - x), y + end * (to_y - y))
        if thick:
            draw.line(segment, (30, 30, 30), width + 2 * scale)
        draw.line(segment, color, width)


def _draw_dot(draw: ImageDraw.ImageDraw, at: Point, color: tuple[int, int, int]) -> None:
    x, y, radius = _SCALE * at[0], _SCALE * at[1], _SCALE * 5
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), color, "white", _SCALE)
