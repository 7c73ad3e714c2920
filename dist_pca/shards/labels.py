"""Convert label files from a data set's own coding to 8-bit train ids."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.images import open_header, open_image
from dist_pca.shards.recipe import IGNORE, Coding

TrainIds = npt.NDArray[np.uint8]
Codes = npt.NDArray[Any]
_UNKNOWN = 254
"""Marker of values outside the table; class tables have at most 254 classes, 0 to 253."""


def lookup_table(coding: Coding, classes: tuple[ClassInfo, ...]) -> TrainIds:
    """Build a table of the train id of every raw value: 2**16 ids, or 2**24 colours as 0xRRGGBB."""
    train_ids = {info.name: index for index, info in enumerate(classes)} | {IGNORE: IGNORE_INDEX}
    size = 1 << (24 if coding.kind == "color" else 16)
    table = np.full(size, IGNORE_INDEX if coding.other == "ignore" else _UNKNOWN, np.uint8)
    if coding.kind == "color":
        for entry in coding.colors:
            red, green, blue = entry.color
            table[red << 16 | green << 8 | blue] = train_ids[entry.name]
    elif coding.ids:
        for raw, name in coding.ids.items():
            table[raw] = train_ids[name]
    else:
        table[: len(classes)] = np.arange(len(classes))
        table[IGNORE_INDEX] = IGNORE_INDEX
    return table


def read_label(path: Path, coding: Coding, table: TrainIds) -> TrainIds:
    """Decode a label file to train ids (height x width, 255 for ignore).

    Args:
        path: The label file.
        coding: Meaning of its values.
        table: `lookup_table` of that coding.

    Raises:
        UserError: the file is not a readable image, lacks the channels that the coding needs, or has values outside
            the table and the coding does not ignore them.
    """
    codes = _READERS[coding.kind](path, coding)
    train_ids: TrainIds = table.take(codes)
    if coding.other == "error" and (unknown := train_ids == _UNKNOWN).any():
        values = np.unique(codes[unknown])
        shown = ", ".join(f"#{value:06x}" if coding.kind == "color" else str(value) for value in values[:5])
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        raise UserError(
            f"{path}: label values outside the recipe's table: {shown}{more}, {unknown.sum()} pixels; "
            "add them to the recipe's coding or set coding.other to ignore"
        )
    return train_ids


def encode_label(train_ids: TrainIds) -> bytes:
    """Encode train ids (height x width) as an 8-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(train_ids).save(buffer, "PNG")
    return buffer.getvalue()


def _read_index(path: Path, coding: Coding) -> Codes:
    image = open_image(path)
    # Pillow opens a 16-bit grey image in mode I;16 or, in older releases, I; palette images stay indices.
    if image.mode not in {"L", "P", "I", "I;16", "I;16B"}:
        raise UserError(
            f"{path}: has image mode {image.mode}, but the recipe's coding `index` needs one channel of ids or a "
            "palette; set coding.kind to channel or color"
        )
    return np.asarray(image)


def _read_channel(path: Path, coding: Coding) -> Codes:
    image = open_image(path)
    bands = len(image.getbands())
    if image.mode == "P" or bands <= coding.channel:
        raise UserError(
            f"{path}: image mode {image.mode} has no channel {coding.channel}; set coding.channel in the recipe"
        )
    if bands == 1:
        return np.asarray(image)
    codes: Codes = np.asarray(image)[..., coding.channel]
    # Pillow decodes several 16-bit channels to their high bytes only. Decoding the file again as if it were
    # little-endian gives the low bytes.
    again = open_header(path)
    rawmode = str(again.tile[0][3])
    if not rawmode.endswith(";16B"):
        return codes
    again.tile = [(*tile[:3], rawmode.replace(";16B", ";16L")) for tile in again.tile]  # type: ignore[misc]
    low: Codes = np.asarray(again)[..., coding.channel]
    return codes.astype(np.uint16) << 8 | low


def _read_color(path: Path, coding: Coding) -> Codes:
    red, green, blue = np.moveaxis(np.asarray(open_image(path).convert("RGB"), np.uint32), -1, 0)
    codes: Codes = red << 16 | green << 8 | blue
    return codes


_READERS = {"index": _read_index, "channel": _read_channel, "color": _read_color}
