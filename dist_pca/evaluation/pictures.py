"""Pictures of labels: in the colours of their classes, and side by side with a legend."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dist_pca.classes import ClassInfo

Pixels = npt.NDArray[np.uint8]

_CELL_WIDTH = 480
_MOST_ASPECT = 4
_GAP = 8
_FONT_SIZE = 18
_LINE = 28
_SWATCH = 18


def color_labels(label: Pixels, classes: Sequence[ClassInfo]) -> Pixels:
    """Train ids (height x width) as RGB in the classes' colours (height x width x 3); all other ids are black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = [info.color for info in classes]
    colored: Pixels = palette[label]
    return colored


def grid_picture(
    rows: Sequence[Sequence[Pixels | None]],
    headings: Sequence[str],
    classes: Sequence[ClassInfo],
    *,
    width: int = _CELL_WIDTH,
) -> Image.Image:
    """Draw rows of RGB images (height x width x 3) under headings, and a legend of the classes.

    Args:
        rows: Images; the first of each row gives the row's proportions, up to 4 : 1, None leaves a place empty.
        headings: Titles of the columns.
        classes: Classes by train id.
        width: Pixels that every image is resized to.
    """
    total = _GAP + len(headings) * (width + _GAP)
    shapes = [row[0].shape for row in rows if row[0] is not None]
    heights = [min(max(1, round(width * shape[0] / shape[1])), _MOST_ASPECT * width) for shape in shapes]
    font = ImageFont.load_default(_FONT_SIZE)
    legend = legend_picture(classes, total, font)
    body = _GAP + _LINE + sum(height + _GAP for height in heights)
    picture = Image.new("RGB", (total, body + legend.height), "white")
    draw = ImageDraw.Draw(picture)
    lefts = [_GAP + column * (width + _GAP) for column in range(len(headings))]
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left + width / 2, _GAP + _LINE / 2), heading, "black", font, anchor="mm")
    top = _GAP + _LINE
    for row, height in zip(rows, heights, strict=True):
        for place, (left, cell) in enumerate(zip(lefts, row, strict=True)):
            if cell is not None:
                # The colours of labels must not mix.
                smooth = Image.Resampling.LANCZOS if place == 0 else Image.Resampling.NEAREST
                picture.paste(Image.fromarray(cell).resize((width, height), smooth), (left, top))
        top += height + _GAP
    picture.paste(legend, (0, body))
    return picture


def legend_picture(
    classes: Sequence[ClassInfo], width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> Image.Image:
    """Draw a legend of class colours and names, and black for no class, wrapped at `width` pixels."""
    entries = [*((info.name, info.color) for info in classes), ("none of these", (0, 0, 0))]
    places = []
    left, top = _GAP, 0
    for name, _ in entries:
        entry_width = _SWATCH + _GAP + round(font.getlength(name)) + 2 * _GAP
        if left > _GAP and left + entry_width > width:
            left, top = _GAP, top + _LINE
        places.append((left, top))
        left += entry_width
    legend = Image.new("RGB", (width, top + _LINE + _GAP), "white")
    draw = ImageDraw.Draw(legend)
    for (name, color), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), color)
        draw.text((left + _SWATCH + _GAP, top + _SWATCH / 2), name, "black", font, anchor="lm")
    return legend
