"""Convert label files from a data set's own coding to 8-bit train ids."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.drawn import NO_OBJECT, draw_label
from dist_pca.shards.images import open_header, open_unconverted, sixteen_bit_channels
from dist_pca.shards.recipe import DRAWN_KINDS, IGNORE, Coding
from dist_pca.shards.sample import MAX_PIXELS, is_deep
from dist_pca.shards.scan import RawSample

TrainIds = npt.NDArray[np.uint8]
Table = TrainIds | dict[str, int]
"""Train id of every raw value, or of every label name if labels are drawn."""
Codes = npt.NDArray[Any]
_UNKNOWN = 254
"""Marker of values outside the table; class tables have at most 254 classes, 0 to 253."""
_COLORS_AT_ONCE = 4096
_WEBP_CHUNKS = 64


def lookup_table(coding: Coding, classes: tuple[ClassInfo, ...]) -> TrainIds:
    """Build a table of the train id of every raw value: 2**16 ids, or 2**24 colours as 0xRRGGBB; 254 is no entry."""
    train_ids = {info.name: index for index, info in enumerate(classes)} | {IGNORE: IGNORE_INDEX}
    table = np.full(1 << (24 if coding.kind == "color" else 16), _UNKNOWN, np.uint8)
    if coding.kind == "color":
        for entry in coding.colors:
            table[_packed(np.array(entry.color))] = train_ids[entry.name]
    elif coding.ids:
        for raw, name in coding.ids.items():
            table[raw] = train_ids[name]
    else:
        table[: len(classes)] = np.arange(len(classes))
        table[IGNORE_INDEX] = IGNORE_INDEX
    return table


def label_table(coding: Coding, classes: tuple[ClassInfo, ...]) -> Table:
    """Build the table of a coding: `lookup_table`, or the train id of every label name if labels are drawn."""
    if coding.kind not in DRAWN_KINDS:
        return lookup_table(coding, classes)
    train_ids = {info.name: index for index, info in enumerate(classes)} | {IGNORE: IGNORE_INDEX}
    names = coding.names or {info.name: info.name for info in classes}
    table = {IGNORE: IGNORE_INDEX, NO_OBJECT: train_ids[coding.background or IGNORE]}
    return table | {name: train_ids[meaning] for name, meaning in names.items()}


def train_id_of(value: int | str, table: Table) -> int | None:
    """Train id of a raw value or label name; None if it is not in the table."""
    found = table.get(str(value), _UNKNOWN) if isinstance(table, dict) else int(table[int(value)])
    return None if found == _UNKNOWN else found


def read_train_ids(
    root: Path, raw: RawSample, coding: Coding, table: Table, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> TrainIds:
    """Read or draw a sample's label as train ids (height x width, 255 for ignore), upright.

    Args:
        root: The data set's folder.
        raw: A sample with a label.
        coding: Meaning of the label's values or names.
        table: `label_table` of that coding.
        size: Width and height of the upright image, to which labels are drawn; images of labels may have another.
        max_pixels: Larger images of labels are refused before they are decoded.

    Raises:
        UserError: as in `read_label` and `draw_label`, or there are label names outside the table and the coding does
            not ignore them.
    """
    if not isinstance(table, dict):
        return read_label(root / str(raw.label), coding, table, max_pixels)
    drawing = draw_label(root, raw, coding, size)
    train_ids: TrainIds = np.array([table.get(name, _UNKNOWN) for name in drawing.names], np.uint8)[drawing.codes]
    return _known(root / str(raw.label), train_ids, drawing.codes, coding, drawing.names)


def count_values(
    root: Path, raw: RawSample, coding: Coding, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> dict[int | str, int]:
    """Count the pixels of each raw value or label name in a sample's label.

    Raises:
        UserError: as in `read_train_ids`, but for values outside the table.
    """
    if coding.kind not in DRAWN_KINDS:
        values, pixels = np.unique(read_codes(root / str(raw.label), coding, max_pixels), return_counts=True)
        return dict(zip(values.tolist(), pixels.tolist(), strict=True))
    drawing = draw_label(root, raw, coding, size)
    values, pixels = np.unique(drawing.codes, return_counts=True)
    return {drawing.names[value]: count for value, count in zip(values.tolist(), pixels.tolist(), strict=True)}


def read_label(path: Path, coding: Coding, table: TrainIds, max_pixels: int = MAX_PIXELS) -> TrainIds:
    """Decode a label file to train ids (height x width, 255 for ignore), upright.

    Args:
        path: The label file.
        coding: Meaning of its values.
        table: `lookup_table` of that coding.
        max_pixels: Larger labels are refused before they are decoded.

    Raises:
        UserError: the file is not a readable image, is of a lossy format, lacks the channels that the coding needs, or
            has values outside the table and the coding does not ignore them.
    """
    codes = read_codes(path, coding, max_pixels)
    return _known(path, table.take(codes), codes, coding)


def read_codes(path: Path, coding: Coding, max_pixels: int = MAX_PIXELS) -> Codes:
    """Decode a label file, upright, to its own ids or to colours as 0xRRGGBB (height x width).

    With a tolerance, colours within it are those of the table that they are nearest to.

    Raises:
        UserError: as in `read_label`, but for values outside the table.
    """
    header = open_header(path, max_pixels)
    if _is_lossy(path, header) and not coding.tolerance:
        option = "give coding.tolerance, how far a colour may be off" if coding.kind == "color" else "save them as PNG"
        raise UserError(
            f"{path}: a label in {header.format}, whose lossy compression changes label values; get the labels in a "
            f"lossless format, or {option}"
        )
    codes = _READERS[coding.kind](path, coding, header, open_unconverted(path, max_pixels))
    if coding.tolerance:
        codes = _nearest_colors(codes, coding)
    if coding.kind != "color" and codes.size and not 0 <= codes.min() <= codes.max() < 1 << 16:
        raise UserError(f"{path}: has ids {codes.min()} to {codes.max()}; give ids from 0 to 65535")
    return codes


def shown_code(code: int | str, coding: Coding) -> str:
    """Write a raw label value as in a recipe: an id, a colour in hexadecimal, or a label name."""
    if isinstance(code, str):
        return code or "(no object)"
    return f"#{code:06x}" if coding.kind == "color" else str(code)


def _known(path: Path, train_ids: TrainIds, codes: Codes, coding: Coding, names: Sequence[str] = ()) -> TrainIds:
    """Ignore or refuse the values outside a table; `names` are those of the codes if the label was drawn."""
    unknown = train_ids == _UNKNOWN
    if not unknown.any():
        return train_ids
    if coding.other == "error":
        values = np.unique(codes[unknown])
        shown = ", ".join(repr(names[value][:40]) if names else shown_code(value, coding) for value in values[:5])
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        raise UserError(
            f"{path}: label values outside the recipe's table: {shown}{more}, "
            f"{unknown.sum()} pixels; add them to the recipe's coding or set coding.other to ignore"
        )
    train_ids[unknown] = IGNORE_INDEX
    return train_ids


def encode_label(train_ids: TrainIds) -> bytes:
    """Encode train ids (height x width) as an 8-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(train_ids).save(buffer, "PNG")
    return buffer.getvalue()


def _packed(colors: Codes) -> Codes:
    """Colours (... x 3) as 0xRRGGBB."""
    red, green, blue = np.moveaxis(colors.astype(np.uint32), -1, 0)
    packed: Codes = red << 16 | green << 8 | blue
    return packed


def _nearest_colors(codes: Codes, coding: Coding) -> Codes:
    """Replace colours by the nearest ones of the table, unless a channel differs by more than the tolerance."""
    values, places = np.unique(codes, return_inverse=True)
    known = np.array([entry.color for entry in coding.colors])
    for start in range(0, len(values), _COLORS_AT_ONCE):
        part = values[start : start + _COLORS_AT_ONCE]
        colors = np.stack([part >> 16, part >> 8 & 255, part & 255], axis=-1).astype(np.int64)
        difference = np.abs(colors[:, None] - known)
        nearest = (difference**2).sum(-1).argmin(-1)
        close = difference.max(-1)[np.arange(len(part)), nearest] <= coding.tolerance
        part[close] = _packed(known[nearest[close]])
    replaced: Codes = values[places.reshape(codes.shape)]
    return replaced


def _is_lossy(path: Path, header: ImageFile.ImageFile) -> bool:
    if header.format != "WEBP":
        return header.format in {"JPEG", "MPO", "AVIF", "JPEG2000"}
    # The chunk of lossless WebP; extended files have others before it.
    with path.open("rb") as file:
        return b"VP8L" not in file.read(_WEBP_CHUNKS)


def _read_index(path: Path, coding: Coding, header: ImageFile.ImageFile, image: Image.Image) -> Codes:
    grey_bits = re.search(r";([24])", str(header.tile[0][3])) if header.tile and header.mode == "L" else None
    # Pillow opens a 16-bit grey image in mode I;16 or, in older releases, I; palette images stay indices.
    if image.mode not in {"1", "L", "P", "I", "I;16", "I;16B"}:
        raise UserError(
            f"{path}: has image mode {image.mode}, but the recipe's coding `index` needs one channel of ids or a "
            "palette; set coding.kind to channel or color"
        )
    codes: Codes = np.asarray(image)
    if image.mode == "1":
        return codes.astype(np.uint8)
    # Pillow spreads grey values of 2 and 4 bits over 0 to 255.
    return codes // {"2": 85, "4": 17}[grey_bits[1]] if grey_bits else codes


def _read_channel(path: Path, coding: Coding, header: ImageFile.ImageFile, image: Image.Image) -> Codes:
    bands = len(image.getbands())
    if image.mode == "P" or bands <= coding.channel:
        raise UserError(
            f"{path}: image mode {image.mode} has no channel {coding.channel}; set coding.channel in the recipe"
        )
    if bands == 1:
        return _read_index(path, coding, header, image)
    codes: Codes = (sixteen_bit_channels(path, image) if is_deep(header) else np.asarray(image))[..., coding.channel]
    return codes


def _read_color(path: Path, coding: Coding, header: ImageFile.ImageFile, image: Image.Image) -> Codes:
    if image.mode[0] in "IF":
        raise UserError(f"{path}: has image mode {image.mode}, which is no colour; set coding.kind to index")
    return _packed(np.asarray(image.convert("RGB")))


_READERS = {"index": _read_index, "channel": _read_channel, "color": _read_color}
