"""Areas of polygons, circles and run-length masks on the pixel grid.

A pixel belongs to a shape if its centre does: pixel (row, column) has its centre at x = column + 0.5, y = row + 0.5.
The inside of a polygon follows the even-odd rule. A centre on an edge belongs to the side to its right or below, so
that polygons with a common edge neither overlap nor leave a gap.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
FARTHEST = 1 << 20
"""Largest coordinate, in pixels; beyond any image that can be read."""
_EDGES_AT_ONCE = 256


def as_points(pairs: Any, fewest: int = 3) -> Points:
    """Check the vertices of a shape, [[x, y], ...] as read from JSON (points x 2).

    Raises:
        ValueError: there are fewer than `fewest`, or they are not pairs of numbers, or one is not finite or too large.
    """
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("the points of a shape must be a list of pairs of numbers")
    if len(pairs) < fewest:
        raise ValueError(f"a shape of {len(pairs)} points, and at least {fewest} are needed")
    for value in (value for pair in pairs for value in pair):
        if type(value) not in (int, float):
            raise ValueError(f"coordinate {str(value)[:20]!r} is no number")
        if not -FARTHEST <= value <= FARTHEST:
            shown = value if isinstance(value, float) else "of many digits"
            raise ValueError(f"coordinate {shown} is not within {FARTHEST:,} pixels")
    return np.array(pairs, np.float64)


def paint_polygon(codes: npt.NDArray[Any], points: Points, code: int) -> None:
    """Set the pixels of a label (height x width) whose centres are inside a polygon (points x 2, x before y)."""
    height, width = codes.shape
    ends = np.stack([points, np.roll(points, -1, axis=0)])
    # Each edge runs downwards, so that its crossings are the same for the polygons on both sides.
    upward = ends[0, :, 1] > ends[1, :, 1]
    ends[:, upward] = ends[::-1, upward]
    (x0, y0), (x1, y1) = ends[0].T, ends[1].T
    # Rows whose centres are at or below the upper end and above the lower one.
    first, last = (np.ceil(y - 0.5).clip(0, height).astype(np.int64) for y in (y0, y1))
    top, bottom = first.min(), last.max()
    left, right = (int(np.clip(math.ceil(x - 0.5), 0, width)) for x in (points[:, 0].min(), points[:, 0].max()))
    if top >= bottom or left >= right:
        return
    toggles = np.zeros((bottom - top, right - left + 1), np.uint8)
    for start in range(0, len(points), _EDGES_AT_ONCE):
        counts = (last - first)[start : start + _EDGES_AT_ONCE]
        edges = np.repeat(np.arange(start, start + len(counts)), counts)
        rows = np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edges]
        # x = x0 + (y - y0) (x1 - x0) / (y1 - y0) at the height of the centres
        crossings = x0[edges] + (rows + 0.5 - y0[edges]) * (x1 - x0)[edges] / (y1 - y0)[edges]
        columns = np.ceil(crossings - 0.5).clip(left, right).astype(np.int64) - left
        np.add.at(toggles, (rows - top, columns), 1)
    # Only whether the number of crossings to the left is odd matters, so it may wrap.
    inside = (np.add.accumulate(toggles, axis=1, dtype=np.uint8) & 1).astype(bool)[:, :-1]
    codes[top:bottom, left:right][inside] = code


def paint_circle(codes: npt.NDArray[Any], center: Points, radius: float, code: int) -> None:
    """Set the pixels of a label (height x width) whose centres are within a radius of a point (x, y)."""
    height, width = codes.shape
    left, top = (max(0, math.floor(value - radius)) for value in center)
    right, bottom = (max(0, math.ceil(value + radius)) for value in center)
    rows, columns = np.arange(top, min(bottom, height)) + 0.5, np.arange(left, min(right, width)) + 0.5
    inside = (rows[:, None] - center[1]) ** 2 + (columns - center[0]) ** 2 <= radius**2
    codes[top : top + len(rows), left : left + len(columns)][inside] = code


def run_length_mask(counts: Any, height: int, width: int) -> Mask:
    """Decode COCO's run lengths to a mask (height x width).

    The runs go down the columns from left to right, and are outside and inside in turn.

    Args:
        counts: A list of numbers, or a string in COCO's compression of one.
        height: Height of the mask.
        width: Width of the mask.

    Raises:
        ValueError: they are neither, or do not add up to the size.
    """
    runs: Sequence[Any] = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("run lengths that are no list of whole numbers from 0, nor COCO's compression of one")
    if sum(runs) != height * width:
        total = f"{sum(runs):,}" if sum(runs) < 1 << 63 else "more than 63 bits hold"
        raise ValueError(f"run lengths that add up to {total} where {width} x {height} pixels are")
    inside = np.arange(len(runs)) % 2 == 1
    mask: Mask = np.repeat(inside, np.array(runs, np.int64)).reshape(width, height).T
    return mask


def _decompressed(text: str) -> list[int]:
    """Decode COCO's compressed run lengths.

    A character above `0` holds five bits, lowest first, and a sixth that says whether more follow; the last one's fifth
    bit is the sign. From the fourth number on, each is the difference to the one two places before.

    Raises:
        ValueError: a character is outside the code, or a number does not end.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"compressed run lengths with a wrong character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths that end within a number")
    return runs
