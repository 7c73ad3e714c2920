"""Write predictions to files: in the format of the Cityscapes evaluation, and as pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.evaluation.pictures import color_labels
from dist_pca.files import replacing
from dist_pca.shards.manifest import Manifest
from dist_pca.shards.recipe import load_recipe

Pixels = npt.NDArray[np.uint8]

_CITYSCAPES_FRAME = re.compile(r"(?:^|[_/])([A-Za-z-]+_\d{6}_\d{6}_leftImg8bit)$")


def cityscapes_ids(classes: Sequence[ClassInfo]) -> Pixels | None:
    """Build a table of 256 entries from train ids to Cityscapes label ids, by class name.

    None if a class is not in Cityscapes: a file must not mix two codings.
    """
    ids = {name: value for value, name in load_recipe("cityscapes").coding.ids.items()}
    if any(info.name not in ids for info in classes):
        return None
    table = np.zeros(256, np.uint8)
    table[: len(classes)] = [ids[info.name] for info in classes]
    return table


def prediction_names(manifest: Manifest) -> dict[str, str]:
    """File name, without extension, of each sample's prediction, by key.

    A Cityscapes image has its original file name, which the official evaluation needs; other names are the keys.
    """
    keys = [key for shard in manifest.shards for key in shard.keys]
    frames = [_CITYSCAPES_FRAME.search(key) for key in keys]
    names = [key if frame is None else frame[1] for key, frame in zip(keys, frames, strict=True)]
    return dict(zip(keys, names if len(set(names)) == len(names) else keys, strict=True))


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
    return Image.blend(Image.fromarray(image), Image.fromarray(color_labels(label, classes)), 0.5)


def save_whole(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        image.save(part, "PNG")
