"""Write predictions to files: as label maps, and as pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.evaluation.pictures import color_labels
from dist_pca.files import replacing

Pixels = npt.NDArray[np.uint8]

_BAND = 1024
"""Rows of an image that are blended at once."""


def save_label(path: Path, label: Pixels, classes: Sequence[ClassInfo] | None = None) -> None:
    """Write a label map, height x width, as an 8-bit PNG of its values.

    Args:
        path: The file, written atomically; its folder is created.
        label: The values.
        classes: Classes whose colours become the palette; None gives a grey image.
    """
    image = Image.fromarray(label)
    if classes is not None:
        image.putpalette([value for info in classes for value in info.color] + [0] * (768 - 3 * len(classes)))
    save_whole(path, image)


def overlay(image: Pixels, label: Pixels, classes: Sequence[ClassInfo]) -> Image.Image:
    """Blend an RGB image, height x width x 3, with its classes' colours, half and half."""
    blended = Image.new("RGB", (image.shape[1], image.shape[0]))
    # Band by band, because Pillow's copies of a large image would not fit into memory.
    for top in range(0, len(image), _BAND):
        rows = slice(top, top + _BAND)
        colors = Image.fromarray(color_labels(label[rows], classes))
        blended.paste(Image.blend(Image.fromarray(image[rows]), colors, 0.5), (0, top))
    return blended


def save_whole(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        image.save(part, "PNG")
