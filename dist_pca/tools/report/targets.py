"""Target images with what networks predict for them, and the scores of these predictions."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.config import RunConfig
from dist_pca.console import plain_console
from dist_pca.data.class_table import missing_classes
from dist_pca.data.stream import EvaluationSample, evaluation_stream
from dist_pca.evaluation.confusion import confusion_matrix
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.load import load_run
from dist_pca.evaluation.pictures import color_labels
from dist_pca.evaluation.report import score
from dist_pca.evaluation.run_report.page import Gallery, LegendEntry, Picture, Section
from dist_pca.evaluation.run_report.record import ScoreRecord, score_record
from dist_pca.evaluation.views import image_pixels
from dist_pca.model.segmenter import backbone_options
from dist_pca.shards.bands import shown
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.report.embedded import drawing, photo

Pixels = npt.NDArray[np.uint8]
WRONG, UNLABELLED = (232, 72, 32), (128, 128, 128)
"""Colours of an error map, beside the grey image where the prediction is right."""
_WIDTH = 416


class Column(NamedTuple):
    """A network whose predictions are shown."""

    title: str
    run: Path
    checkpoint: str
    """Name of its checkpoint."""
    scored: bool
    """Whether its predictions for all images are scored, if they have labels."""


@dataclass(frozen=True)
class Predicted:
    """What one network gives for the images of shards."""

    classes: tuple[ClassInfo, ...]
    images: list[EvaluationSample]
    """The images that are shown, with labels in the classes' train ids."""
    labels: list[Pixels] = field(default_factory=list)
    """Train ids that the network predicts for them."""
    score: ScoreRecord | None = None


def predict_targets(column: Column, manifest: Manifest, count: int, device: torch.device | str) -> Predicted:
    """Run a network on images evenly spaced in shards, or on all of them if it is to be scored.

    Args:
        column: The network.
        manifest: The shards.
        count: Most images that are shown.
        device: Where the network runs.

    Raises:
        UserError: the run, its checkpoint or a shard cannot be read, or it takes other bands than the shards have.
    """
    config, classes, model = load_run(column.run, column.checkpoint)
    model = model.to(device)
    scored = column.scored and manifest.labelled
    stride = max(1, manifest.samples // max(1, count))
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    result = Predicted(classes, [])
    for index, sample in _samples(manifest, classes, config, stride, None if scored else count, column.title):
        pixels = image_pixels(sample.image, device)
        size = (sample.image.shape[0], sample.image.shape[1])
        label = predict(model, pixels, config.input_size(*size), size, config.evaluation)[0].cpu()
        if scored:
            counts += confusion_matrix(label, torch.from_numpy(sample.label), len(classes), IGNORE_INDEX)
        if index % stride == 0 and len(result.images) < count:
            result.images.append(sample)
            result.labels.append(label.numpy())
    if not scored:
        return result
    missing = missing_classes(manifest, classes, config.evaluation.class_map)
    of_all = score(counts, classes, manifest.samples, config.evaluation.label_sets, missing=missing)
    scores = json.loads(of_all.to_json()) | {"confusion": counts.tolist()}
    step = int(column.checkpoint.rpartition("-")[2])
    return Predicted(classes, result.images, result.labels, score_record(scores, str(manifest.location), step))


def _samples(
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    stride: int,
    count: int | None,
    title: str,
) -> Iterator[tuple[int, EvaluationSample]]:
    """All samples with their index, or `count` of them, `stride` apart."""
    step = 1 if count is None else stride
    total = manifest.samples if count is None else min(count, len(range(0, manifest.samples, stride)))
    console = plain_console(stderr=True)
    stream = evaluation_stream(
        manifest,
        0,
        step,
        classes=classes,
        class_map=config.evaluation.class_map,
        bands=backbone_options(config.model).bands,
        workers=0,
        cache=config.data.cache,
    )
    with closing(stream) as samples:
        shown = track(
            islice(samples, total), title, total, console=console, transient=True, disable=not console.is_terminal
        )
        for place, sample in enumerate(shown):
            yield step * place, sample


def target_section(columns: Sequence[Column], predicted: Sequence[Predicted], shards: str) -> Section:
    """Show images with their truth, predictions and error maps, a group of pictures for each image."""
    first = predicted[0]
    labelled = any(sample.label is not None for sample in first.images)
    legend = [LegendEntry(info.name, info.color) for info in first.classes]
    legend += [LegendEntry("wrong", WRONG), LegendEntry("no label", UNLABELLED)] if labelled else []
    galleries = [
        Gallery(sample.key, _pictures(columns, predicted, place), legend if place == 0 else ())
        for place, sample in enumerate(first.images)
    ]
    intro = f"Images evenly spaced in {shards}." + ("" if labelled else " They have no labels, so there are no errors.")
    return Section("Target images", galleries, intro if galleries else "")


def _pictures(columns: Sequence[Column], predicted: Sequence[Predicted], place: int) -> list[Picture]:
    sample = predicted[0].images[place]
    pictures = [photo(shown(sample.image), alt=f"Image {sample.key}", caption="input", width=_WIDTH)]
    if sample.label is not None:
        truth = color_labels(sample.label, predicted[0].classes)
        pictures.append(drawing(truth, alt=f"True labels of {sample.key}", caption="truth", width=_WIDTH))
    for column, result in zip(columns, predicted, strict=True):
        label, own = result.labels[place], result.images[place]
        alt = f"Labels of {sample.key} that {column.title} predicts"
        pictures.append(drawing(color_labels(label, result.classes), alt=alt, caption=column.title, width=_WIDTH))
        if own.label is not None:
            errors, share = error_map(shown(own.image), own.label, label)
            alt = f"Where {column.title} is wrong on {sample.key}"
            caption = f"{column.title}: {100 * share:.0f} % wrong"
            pictures.append(photo(errors, alt=alt, caption=caption, width=_WIDTH))
    return pictures


def error_map(image: Pixels, truth: Pixels, label: Pixels) -> tuple[Pixels, float]:
    """Draw where a prediction is wrong over a grey image; also returns the share of labelled pixels that are wrong.

    Args:
        image: RGB, height x width x 3.
        truth: True train ids, height x width.
        label: Predicted train ids.
    """
    grey = 40 + 0.6 * image.mean(axis=2, keepdims=True)
    drawn = np.broadcast_to(grey, image.shape).copy()
    counted = truth != IGNORE_INDEX
    wrong = counted & (label != truth)
    drawn[wrong] = 0.25 * drawn[wrong] + 0.75 * np.array(WRONG)
    drawn[~counted] = UNLABELLED
    return drawn.astype(np.uint8), float(wrong.sum() / max(1, counted.sum()))
