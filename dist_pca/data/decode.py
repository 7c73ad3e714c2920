"""Decode samples from possibly untrusted shards, and replace corrupt ones.

Only known extensions are decoded, and only up to a size limit.
"""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dist_pca.config import DataConfig
from dist_pca.data.randomness import Domain
from dist_pca.data.read import RawSample, ShardReader, read_selected
from dist_pca.data.source import Sampler, Selection
from dist_pca.errors import CorruptSample, UserError
from dist_pca.shards.bands import Picture
from dist_pca.shards.sample import (
    LABEL_FORMATS,
    ImageTooLarge,
    UnknownRange,
    WrongSize,
    check_label_mode,
    decode_header,
    decode_image,
    decode_pixels,
    image_member,
)

Pixels = npt.NDArray[np.uint8]
Decoded = TypeVar("Decoded", bound=Picture)
_MOST_REPLACEMENTS = 8
"""Number of replacements drawn for a corrupt sample before the stream fails."""


class DecodedSample(NamedTuple):
    """A decoded sample: the selected one, or a replacement if it is corrupt."""

    selection: Selection
    key: str
    size: tuple[int, int]
    """Height and width of the stored image; a JPEG may be decoded smaller."""
    image: Picture
    """RGB, or of the folder's bands."""
    label: Image.Image | None
    """The folder's 8-bit train ids; None if the shards have no labels."""
    skipped: list[str]
    """Error messages of corrupt samples that were replaced."""


def decode_or_replace(
    largest_edge: int,
    sampler: Sampler,
    openers: Sequence[Callable[[], ShardReader]],
    labelled: bool,
    raw: RawSample,
) -> DecodedSample:
    """Decode a sample; if it is corrupt, a replacement from the same folder.

    Args:
        largest_edge: Largest shorter edge to which the image may be resized, in pixels.
        sampler: Selects replacements.
        openers: For each shard folder, a function that creates its reader.
        labelled: Whether labels are decoded too.
        raw: The sample.

    Raises:
        UserError: the sample and all replacements that were tried are corrupt.
    """
    skipped: list[str] = []
    while True:
        selection, members = raw
        try:
            if isinstance(members, CorruptSample):
                raise members
            size = members["__size__"]
            image, label = decode_sample(
                members,
                label_member=sampler.manifests[selection.offset.folder].label_member if labelled else None,
                minimum_size=resized_size(size, largest_edge),
            )
            return DecodedSample(selection, members["__key__"], size, image, label, skipped)
        except CorruptSample as error:
            skipped.append(str(error))
            if len(skipped) > _MOST_REPLACEMENTS:
                raise UserError(f"{error}; {_MOST_REPLACEMENTS} replacements are corrupt too") from error
        offset = sampler.fallback(selection.sample_index, len(skipped))
        with closing(openers[offset.folder]()) as reader:
            raw = read_selected(reader, Selection(selection.sample_index, offset, wanted=None))


def decode_evaluation_sample(
    table: Pixels | None, label_member: str, sample: dict[str, Any]
) -> tuple[str, torch.Tensor, torch.Tensor | None, str]:
    """Decode a whole sample: key, uint8 image [H, W, C], uint8 labels [H, W] converted by `table` if it is given, and
    the path of the file that the image was made from, empty where the sample does not say it.

    Raises:
        CorruptSample: as `decode_sample`.
    """
    image, label = decode_sample(sample, label_member=None if table is None else label_member)
    train_ids = None if table is None or label is None else torch.from_numpy(table[np.asarray(label)])
    # Tensors are passed between processes in shared memory.
    return sample["__key__"], torch.from_numpy(np.array(image)), train_ids, _source(sample)


def _source(sample: dict[str, Any]) -> str:
    try:
        description = json.loads(sample.get("json", b"null"))
    except (ValueError, RecursionError):
        return ""
    source = description.get("source") if isinstance(description, dict) else None
    return source if isinstance(source, str) else ""


def decode_sample(
    sample: dict[str, Any], *, label_member: str | None, minimum_size: tuple[int, int] | None = None
) -> tuple[Picture, Image.Image | None]:
    """Decode the image of a sample, and its label image (8-bit train ids) if `label_member` is given.

    Members with other extensions are never decoded.

    Args:
        sample: Result of `ShardReader.read`.
        label_member: Extension of the label to decode; the sample must have it.
        minimum_size: Height and width; a JPEG may be decoded at a half, a quarter or an eighth of its size, if the
            result is at least this large.

    Raises:
        CorruptSample: the image or label is missing, damaged, of an unknown format, larger than `MAX_PIXELS` pixels or
            of another size or number of bands than in the manifest; the message names shard and key.
    """
    where = f"{sample['__url__']}: sample {sample['__key__']!r}"
    try:
        member = image_member(sample, None, sample.get("__image__"))
    except ValueError as error:
        raise CorruptSample(f"{where}: {error}; build the shards again") from None
    size = sample["__size__"]
    image = _decode(f"{where}: {member}", lambda: decode_image(sample[member], member, minimum_size, size))
    bands = len(image.getbands())
    if bands != sample["__bands__"]:
        raise CorruptSample(
            f"{where}: {member}: {bands} bands where the manifest lists {sample['__bands__']}; build the shards again "
            "with --force"
        )
    if label_member is None:
        return image, None
    if label_member not in sample:
        raise CorruptSample(f"{where}: no {label_member}, although the manifest lists labels; build the shards again")
    label = _decode(
        f"{where}: {label_member}",
        lambda: decode_pixels(decode_header(io.BytesIO(sample[label_member]), LABEL_FORMATS), size=size),
    )
    try:
        check_label_mode(label)
    except ValueError as error:
        raise CorruptSample(f"{where}: {label_member}: {error}; build the shards again") from None
    return image, label


def resize_range(config: DataConfig, domain: Domain) -> tuple[int, int]:
    """Closed range of the shorter edge to which a domain's images are resized, in pixels."""
    own = config.source_shorter_edge if domain == "source" else None
    return own or config.shorter_edge


def resized_size(size: tuple[int, int], shorter_edge: int) -> tuple[int, int]:
    """(height, width) of an image after its shorter edge is resized to `shorter_edge`, with its aspect ratio kept."""
    height, width = size
    shorter = min(size)
    return round(height * shorter_edge / shorter), round(width * shorter_edge / shorter)


def _decode(where: str, decode: Callable[[], Decoded]) -> Decoded:
    try:
        return decode()
    except ImageTooLarge as error:
        raise CorruptSample(f"{where}: {error}; build the shards again with --max-edge or --tile") from None
    except WrongSize as error:
        raise CorruptSample(f"{where}: {error}; build the shards again with --force") from None
    except UnknownRange as error:
        raise CorruptSample(f"{where}: {error}; state their `range` in a recipe and build the shards again") from None
    except ValueError as error:
        raise CorruptSample(f"{where}: {error}; copy the shard again or build it again") from error
