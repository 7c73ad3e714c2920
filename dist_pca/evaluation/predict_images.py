"""Predict labels of image files, and write them to files."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.errors import UserError
from dist_pca.evaluation.image_files import result_names
from dist_pca.evaluation.inference import predict, proportional_input_size
from dist_pca.evaluation.label_files import overlay, save_label, save_whole
from dist_pca.evaluation.prediction_files import Values
from dist_pca.evaluation.views import image_pixels
from dist_pca.files import write_json
from dist_pca.shards.bands import shown
from dist_pca.shards.images import AS_RGB, Reading, open_image
from dist_pca.shards.sample import MAX_PIXELS


@dataclass(frozen=True)
class Predicted:
    """Result of predicting a list of images."""

    written: int
    """Number of images whose results were written."""
    skipped: tuple[str, ...]
    """Error message of each skipped image."""


def predict_images(
    model: nn.Module,
    images: Sequence[Path],
    out: Path,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    *,
    device: torch.device | str,
    values: Values | None = None,
    labels: bool = True,
    overlays: bool = True,
    on_error: Literal["fail", "skip"] = "fail",
    reading: Reading = AS_RGB,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], None] = lambda done: None,
) -> Predicted:
    """Predict labels of images of any size, one at a time, and write the results at the images' size.

    Args:
        model: A segmenter in evaluation mode, on `device`.
        images: Image files.
        out: Folder of `labels/NAME.png`, `overlays/NAME.png`, and `classes.json`, names and colours by train id. Each
            file is written atomically.
        classes: Classes by train id.
        config: The run: sizes and evaluation protocol. The aspect ratio of images is kept.
        device: Device of the model.
        values: What label maps hold; None are 8-bit train ids with a palette of the classes' colours.
        labels: Write label maps.
        overlays: Write the images with colours overlaid.
        on_error: What to do with an unreadable image: stop, or skip it.
        reading: Bands and range of values; the bands are as many as the network takes.
        max_pixels: Larger images are refused.
        progress: Called with the number of images done.

    Raises:
        UserError: an image cannot be read and is not to be skipped, or a result cannot be written.
    """
    skipped = []
    for done, (path, name) in enumerate(result_names(images).items()):
        progress(done)
        try:
            image = np.array(open_image(path, reading, max_pixels))
        except UserError as error:
            if on_error == "fail":
                raise
            skipped.append(str(error).partition(";")[0])
            continue
        size = (image.shape[0], image.shape[1])
        pixels = image_pixels(image, device)
        label = predict(model, pixels, proportional_input_size(config, *size), size, config.evaluation)[0].cpu().numpy()
        try:
            if done == len(skipped):
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / "classes.json", [asdict(info) for info in classes])
            if labels:
                file = out / "labels" / f"{name}.png"
                save_label(file, *((label, classes) if values is None else (values.table[label], None)))
            if overlays:
                save_whole(out / "overlays" / f"{name}.png", overlay(shown(image), label, classes))
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error}); give another folder") from error
    progress(len(images))
    return Predicted(len(images) - len(skipped), tuple(skipped))
