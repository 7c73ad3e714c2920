"""Augment decoded samples: random resize, crop and flip, a function of the seed and the sample index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from dist_pca.config import DataConfig, SamplingConfig
from dist_pca.data.decode import DecodedSample, Pixels, resize_range, resized_size
from dist_pca.data.randomness import Domain, Purpose, draw
from dist_pca.errors import UserError
from dist_pca.shards.bands import Picture
from dist_pca.shards.manifest import Manifest


class CropSample(NamedTuple):
    """One cropped sample."""

    image: Pixels
    """uint8, bands x height x width."""
    label: Pixels | None
    """Train ids of the run, height x width."""
    key: str
    sample_index: int
    skipped: list[str]
    """Error messages of corrupt samples that this one replaces."""
    beside: tuple[int, int]
    """Columns of the resized image, mirrored as the crop is, to the left and to the right of the crop."""


@dataclass(frozen=True)
class Crop:
    """A window of a resized image. All sizes are (height, width) in pixels."""

    resized: tuple[int, int]
    """Size to which the whole image is resized."""
    top: int
    left: int
    size: tuple[int, int]
    flip: bool
    """Whether the window is mirrored left to right."""

    @property
    def beside(self) -> tuple[int, int]:
        """Columns of the resized image to the left and to the right of the window, after mirroring."""
        right = self.resized[1] - self.left - self.size[1]
        return (right, self.left) if self.flip else (self.left, right)


def augment_sample(
    config: DataConfig, seed: int, domain: Domain, tables: Sequence[Pixels | None], decoded: DecodedSample
) -> CropSample:
    """Draw a crop of a sample, one that shows the class for which it was drawn if possible, and apply it.

    Args:
        config: Ranges of the crops, and what they must show.
        seed: Seed of the run.
        domain: Domain of the sample.
        tables: For each shard folder, the run's train id of each of the folder's, 256 entries; None without labels.
        decoded: The sample.
    """
    selection, image, label = decoded.selection, decoded.image, decoded.label
    table = tables[selection.offset.folder]
    draw = partial(draw_crop, decoded.size, config, seed=seed, domain=domain, index=selection.sample_index)
    if label is None or table is None:
        crop = draw()
        pixels, _ = apply_crop(image, None, crop)
        return CropSample(pixels, None, decoded.key, selection.sample_index, decoded.skipped, crop.beside)
    wanted = selection.wanted
    crop = draw() if wanted is None else _draw_crop_with(wanted, label, table, draw, config.sampling)
    pixels, train_ids = apply_crop(image, label, crop)
    assert train_ids is not None
    labels = table.take(train_ids)
    return CropSample(pixels, labels, decoded.key, selection.sample_index, decoded.skipped, crop.beside)


def draw_crop(
    size: tuple[int, int], config: DataConfig, *, seed: int, domain: Domain, index: int, attempt: int = 0
) -> Crop:
    """Draw a crop, a pure function of its arguments.

    Args:
        size: (height, width) of the image; must be large enough according to `check_crop`.
        config: Ranges: those of the shorter edge, `crop` and `flip`.
        seed: Seed of the run.
        domain: Domain of the sample; the two domains draw independently.
        index: Sample index.
        attempt: Number of the crop, if several are drawn of the same sample.
    """
    # The first crop is the same whether or not others follow.
    counter = (index, attempt) if attempt else (index,)
    edge, top, left, flip = (int(bits) for bits in draw(4, seed, domain, Purpose.CROP, *counter))
    low, high = resize_range(config, domain)
    resized = resized_size(size, low + edge % (high - low + 1))
    height, width = config.crop
    return Crop(
        resized=resized,
        top=top % (resized[0] - height + 1),
        left=left % (resized[1] - width + 1),
        size=config.crop,
        flip=flip < config.flip * 2**64,
    )


def apply_crop(image: Picture, label: Image.Image | None, crop: Crop) -> tuple[Pixels, Pixels | None]:
    """Crop the same window from an image (antialiased, bicubic) and its label (nearest neighbour).

    Returns:
        The image as bands x height x width, and the label as height x width.
    """
    pixels = np.ascontiguousarray(_resize_window(image, crop, Image.Resampling.BICUBIC).transpose(2, 0, 1))
    return pixels, None if label is None else crop_label(label, crop)


def crop_label(label: Image.Image, crop: Crop) -> Pixels:
    """Crop a window from a label image, by nearest neighbour; height x width."""
    return np.ascontiguousarray(_resize_window(label, crop, Image.Resampling.NEAREST))


def check_crop(manifest: Manifest, config: DataConfig, domain: Domain) -> None:
    """Check that the crop fits into every image of a domain's shards at the domain's smallest shorter edge.

    Raises:
        UserError: it does not; the message names the image into which it fits least.
    """

    smallest, crop = resize_range(config, domain)[0], config.crop

    def slack(entry: tuple[str, tuple[int, int]]) -> int:
        height, width = resized_size(entry[1], smallest)
        return min(height - crop[0], width - crop[1])

    sizes = (
        (key, (height, width))
        for shard in manifest.shards
        for key, height, width in zip(shard.keys, shard.heights, shard.widths, strict=True)
    )
    key, size = tightest = min(sizes, key=slack)
    if slack(tightest) < 0:
        height, width = resized_size(size, smallest)
        own = domain == "source" and config.source_shorter_edge is not None
        raise UserError(
            f"data.crop: {crop[0]} x {crop[1]} does not fit into {manifest.folder}: image {key!r} ({size[0]} x "
            f"{size[1]}) measures {height} x {width} at a shorter edge of {smallest}; lower data.crop or raise "
            f"data.{'source_' if own else ''}shorter_edge"
        )


def _draw_crop_with(
    wanted: int, label: Image.Image, table: Pixels, draw: Callable[..., Crop], sampling: SamplingConfig
) -> Crop:
    """Draw crops until one has enough pixels of a class; if none has, return the one with the most."""
    best, most = draw(), -1
    for attempt in range(sampling.crop_attempts):
        crop = draw(attempt=attempt)
        pixels = int((table[crop_label(label, crop)] == wanted).sum())
        if pixels > most:
            best, most = crop, pixels
        if most >= sampling.min_crop_pixels:
            break
    return best


def _resize_window(picture: Picture, crop: Crop, resampling: Image.Resampling) -> Pixels:
    # Resizing only the window gives the same pixels as resizing the whole image.
    down, across = picture.height / crop.resized[0], picture.width / crop.resized[1]
    height, width = crop.size
    box = (
        crop.left * across,
        crop.top * down,
        min((crop.left + width) * across, picture.width),
        min((crop.top + height) * down, picture.height),
    )
    pixels = np.asarray(picture.resize((width, height), resampling, box=box))
    return pixels[:, ::-1] if crop.flip else pixels
