"""Cycles drawn from source pixels to the target pixels that they match, and to the source pixels that these match."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from dist_pca.association.sampling import class_balanced
from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.evaluation.cycles import JudgedCycles

Point = tuple[float, float]
CLOSED, BROKEN = (70, 200, 245), (255, 140, 40)
"""Colours of cycles that are consistent, and of those that are not."""
_KEY = "blue: consistent; dashed, with a cross: refused by the teacher; orange: not consistent"
OUTCOMES = ("kept", "refused by the teacher", "not consistent")
LINES = 6
"""Cycles drawn of each outcome."""
_WIDTH, _GAP, _BAND, _MARGIN = 1160, 8, 96, 46
"""Pixels: of the picture, between images, between rows of images, and above each row for its titles."""
_SCALE = 2
"""Drawn this much larger and reduced, which smooths the lines."""
_RADIUS = 6


class DrawnCycle(NamedTuple):
    """One cycle of a batch; pixels are counted over the batch's images of their domain."""

    source: int
    target: int
    end: int
    label: int
    """Class of the source pixel."""
    end_label: int
    """Class of the source pixel where the cycle ends, 255 where it has none."""
    truth: int
    """True class of the target pixel, 255 where it has none."""
    outcome: str


def sample_cycles(candidate_sets: Sequence[JudgedCycles], *, seed: int) -> list[DrawnCycle]:
    """Choose up to `LINES` cycles of each outcome at random, spread over the source's classes."""
    labels, targets, ends, truth, consistent, kept = _joined(candidate_sets)
    outcome = torch.where(kept, 0, torch.where(consistent, 1, 2))
    chosen: list[DrawnCycle] = []
    for number, name in enumerate(OUTCOMES):
        own = torch.where(outcome == number, labels, IGNORE_INDEX)
        pixels = class_balanced(own, LINES, IGNORE_INDEX, seed)
        for pixel in pixels[own[pixels] != IGNORE_INDEX].tolist():
            target, end = int(targets[pixel]), int(ends[pixel])
            chosen.append(
                DrawnCycle(pixel, target, end, int(labels[pixel]), int(labels[end]), int(truth[target]), name)
            )
    return chosen


def count_outcomes(candidate_sets: Sequence[JudgedCycles]) -> dict[str, int]:
    """Number of cycles of labelled source pixels by outcome."""
    labels, _, _, _, consistent, kept = _joined(candidate_sets)
    labelled = labels != IGNORE_INDEX
    masks = kept, consistent & ~kept, ~consistent
    return {name: int((labelled & mask).sum()) for name, mask in zip(OUTCOMES, masks, strict=True)}


def _joined(candidate_sets: Sequence[JudgedCycles]) -> tuple[torch.Tensor, ...]:
    """Labels, matches, ends, true classes of targets, consistent and kept of all sets, in pixels of the batch."""
    sources = np.cumsum([0, *(len(cycles.labels) for cycles in candidate_sets)]).tolist()
    targets = np.cumsum([0, *(len(cycles.target_labels) for cycles in candidate_sets)]).tolist()
    return (
        torch.cat([cycles.labels for cycles in candidate_sets]),
        torch.cat([cycles.targets + start for cycles, start in zip(candidate_sets, targets, strict=False)]),
        torch.cat([cycles.ends + start for cycles, start in zip(candidate_sets, sources, strict=False)]),
        torch.cat([cycles.target_labels for cycles in candidate_sets]),
        torch.cat([cycles.consistent for cycles in candidate_sets]),
        torch.cat([cycles.kept for cycles in candidate_sets]),
    )


def image_names(images: int, ranks: int) -> list[str]:
    """Name images, with the rank of each where they are divided evenly."""
    if ranks == 1 or images % ranks:
        return [f"image {place + 1}" for place in range(images)]
    return [f"image {place + 1} on rank {place // (images // ranks)}" for place in range(images)]


def draw_cycles(
    images: Sequence[npt.NDArray[np.uint8]],
    grids: tuple[tuple[int, int], tuple[int, int]],
    cycles: Sequence[DrawnCycle],
    classes: Sequence[ClassInfo],
    names: Sequence[Sequence[str]],
) -> Image.Image:
    """Draw cycles over three rows of crops: the source's, the target's, and the source's again.

    Args:
        images: uint8 [m, H, W, 3] of source and target.
        grids: Rows and columns of an image's source and target pixels.
        cycles: What to draw; they are numbered from 1.
        classes: Give the colours of dots.
        names: What is written over each image of source and target.
    """
    rows = [
        (0, f"source pixels ({_KEY})"),
        (1, "their matches in target images"),
        (0, "source pixels that these match"),
    ]
    columns = max(len(own) for own in images)
    cell = (_WIDTH - (columns + 1) * _GAP) / columns
    heights = [cell * own.shape[1] / own.shape[2] for own in images]
    tops = [float(_MARGIN)]
    for side, _ in rows[:-1]:
        tops.append(tops[-1] + heights[side] + _BAND)
    height = round(tops[-1] + heights[0] + _GAP)
    large = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), (24, 28, 32))
    for top, (side, _) in zip(tops, rows, strict=True):
        for place, image in enumerate(images[side]):
            crop = Image.fromarray(np.ascontiguousarray(image)).resize(
                (round(cell * _SCALE), round(heights[side] * _SCALE)), Image.Resampling.BICUBIC
            )
            # A little darker, so that lines and dots stand out.
            crop = Image.blend(crop, Image.new("RGB", crop.size), 0.25)
            large.paste(crop, (round((_GAP + place * (cell + _GAP)) * _SCALE), round(top * _SCALE)))

    def point(pixel: int, row: int) -> Point:
        side = rows[row][0]
        image, inside = divmod(pixel, grids[side][0] * grids[side][1])
        line, column = divmod(inside, grids[side][1])
        return (
            _SCALE * (_GAP + image * (cell + _GAP) + (column + 0.5) / grids[side][1] * cell),
            _SCALE * (tops[row] + (line + 0.5) / grids[side][0] * heights[side]),
        )

    draw = ImageDraw.Draw(large)
    paths = [[point(cycle.source, 0), point(cycle.target, 1), point(cycle.end, 2)] for cycle in cycles]
    for cycle, path in zip(cycles, paths, strict=True):
        color = BROKEN if cycle.outcome == OUTCOMES[2] else CLOSED
        for start, end in pairwise(path):
            _draw_line(draw, start, end, color, dashed=cycle.outcome == OUTCOMES[1])
    font = ImageFont.load_default(13 * _SCALE)
    for number, (cycle, path) in enumerate(zip(cycles, paths, strict=True), 1):
        for label, (x, y) in zip((cycle.label, cycle.truth, cycle.end_label), path, strict=True):
            fill = (255, 255, 255) if label == IGNORE_INDEX else classes[label].color
            radius = _RADIUS * _SCALE
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, (255, 255, 255), _SCALE)
        if cycle.outcome == OUTCOMES[1]:
            (x, y), arm = path[1], 1.7 * _RADIUS * _SCALE
            for slope in (1, -1):
                draw.line((x - arm, y - slope * arm, x + arm, y + slope * arm), (255, 255, 255), 2 * _SCALE)
        for x, y in (path[0], path[2]):
            # Where there is no room on the right of the dot, on the left.
            side, anchor = (1, "lm") if x < (_WIDTH - 40) * _SCALE else (-1, "rm")
            at = (x + 1.4 * side * _RADIUS * _SCALE, y)
            draw.text(at, str(number), "white", font, anchor=anchor, stroke_width=2 * _SCALE, stroke_fill="black")
    for top, (side, title) in zip(tops, rows, strict=True):
        texts = [(float(_GAP), top - 26, title)]
        texts += [(_GAP + place * (cell + _GAP), top - 7, name) for place, name in enumerate(names[side])]
        for left, bottom, text in texts:
            at = (_SCALE * left, _SCALE * bottom)
            draw.text(at, text, (230, 234, 238), font, anchor="ls", stroke_width=2 * _SCALE, stroke_fill=(24, 28, 32))
    return large.reduce(_SCALE)


def _draw_line(
    draw: ImageDraw.ImageDraw, start: Point, end: Point, color: tuple[int, int, int], *, dashed: bool
) -> None:
    (x, y), (to_x, to_y) = start, end
    dashes = max(1, round(float(np.hypot(to_x - x, to_y - y)) / (16 * _SCALE))) if dashed else 1
    filled = 0.55 if dashed else 1.0
    for dash in range(dashes):
        first, last = dash / dashes, (dash + filled) / dashes
        segment = (x + first * (to_x - x), y + first * (to_y - y), x + last * (to_x - x), y + last * (to_y - y))
        draw.line(segment, (0, 0, 0), 4 * _SCALE)
        draw.line(segment, color, 2 * _SCALE)
