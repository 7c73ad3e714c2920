"""Run a network on a shard folder, divided among ranks: score it, and write its predictions."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from dist_pca.classes import IGNORE_INDEX, ClassInfo, label_set_members
from dist_pca.config import RunConfig
from dist_pca.console import plain_console
from dist_pca.data.class_table import missing_classes
from dist_pca.data.stream import EvaluationSample, evaluation_stream
from dist_pca.distributed import all_reduce_sum, gather_objects, is_rank0, rank, world_size
from dist_pca.errors import UserError
from dist_pca.evaluation.boundary import boundary_counts
from dist_pca.evaluation.confusion import confusion_matrix
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.prediction_files import Values, prediction_folder, prediction_values
from dist_pca.evaluation.report import Scores, score
from dist_pca.evaluation.score_files import ImageScores, image_scores, write_scores
from dist_pca.evaluation.views import image_pixels
from dist_pca.files import new_folder
from dist_pca.model.segmenter import backbone_options
from dist_pca.shards.manifest import Manifest


def evaluate(
    model: nn.Module,
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    *,
    device: torch.device | str,
    predictions: Path | None = None,
    values: Values | None = None,
    score_folder: Path | None = None,
    quiet: bool = False,
) -> Scores:
    """Score a segmenter on every image of a shard folder, at the labels' original size.

    Collective if torch.distributed is initialised: images are divided among ranks and integer counts are summed, so
    every rank gets the same scores at any world size. The batch size is 1. The model's mode (training or evaluation)
    is restored.

    Args:
        model: A segmenter on `device`.
        manifest: Labelled shards.
        classes: The classes that the model was trained on, by train id; labels of others are ignored. Classes that the
            shards do not have are left out of all means.
        config: The run: sizes, evaluation protocol, label sets and loader processes.
        device: Device of the model.
        predictions: Folder to create atomically, for one PNG of each image at its label's size. Ranks must share its
            file system.
        values: What these files hold; None is the default of `prediction_values`.
        score_folder: Folder to create atomically for the files of `write_scores`. Ranks must share its file system.
        quiet: Show no progress on rank 0's stderr.

    Raises:
        UserError: a folder is not empty or cannot be written, the shards have no labels, none of the classes or other
            bands than the network takes, a label set is not covered by `classes`, or a sample cannot be read.
    """
    if not manifest.labelled:
        raise UserError(
            f"shards {manifest.folder}: have no labels; evaluate on labelled shards, or write the predictions alone "
            "with --write-predictions"
        )
    protocol = config.evaluation
    label_set_members(protocol.label_sets, classes)
    missing = missing_classes(manifest, classes, protocol.class_map)
    unscored = [index for index, info in enumerate(classes) if info.name in missing]
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    ratio = protocol.boundary_iou
    boundaries = torch.zeros(3, len(classes), dtype=torch.int64, device=device)
    images: list[ImageScores] = []
    with ExitStack() as stack:
        staged = score_folder and stack.enter_context(new_folder(score_folder, "--write-scores"))
        if predictions is not None:
            values = values or prediction_values(classes, None, manifest)
            save = stack.enter_context(prediction_folder(predictions, values))
        predicted = _predictions(model, manifest, classes, config, device=device, quiet=quiet)
        for sample, prediction in stack.enter_context(closing(predicted)):
            truth = torch.from_numpy(sample.label).to(device)
            confusion = confusion_matrix(prediction, truth, len(classes), IGNORE_INDEX)
            counts += confusion
            if ratio is not None:
                boundaries += boundary_counts(prediction, truth, len(classes), ratio)
            if staged:
                images.append(image_scores(sample.key, confusion.cpu(), unscored))
            if predictions is not None:
                save(sample.key, sample.source, prediction.cpu().numpy())
        counts = all_reduce_sum(counts).cpu()
        boundary = None if ratio is None else all_reduce_sum(boundaries).cpu()
        scores = score(counts, classes, manifest.samples, protocol.label_sets, boundary=boundary, missing=missing)
        if staged:
            everything = _in_order(images, manifest)
            if is_rank0():
                write_scores(staged, scores, counts, everything)
    return scores


def write_predictions(
    model: nn.Module,
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    folder: Path,
    values: Values,
    *,
    device: torch.device | str,
) -> None:
    """Write a segmenter's prediction of every image of a shard folder, as `evaluate` does but without any labels.

    Collective if torch.distributed is initialised.

    Args:
        model: A segmenter on `device`.
        manifest: Shards, with labels or without.
        classes: The classes that the model was trained on, by train id.
        config: The run: sizes, evaluation protocol and loader processes.
        folder: Folder to create atomically, for one PNG of each image at its size. Ranks must share its file system.
        values: What the files hold.
        device: Device of the model.

    Raises:
        UserError: the folder is not empty or cannot be written, the shards have other bands than the network takes, or
            a sample cannot be read.
    """
    predicted = _predictions(model, manifest, classes, config, device=device)
    with prediction_folder(folder, values) as save, closing(predicted):
        for sample, prediction in predicted:
            save(sample.key, sample.source, prediction.cpu().numpy())


def _predictions(
    model: nn.Module,
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    *,
    device: torch.device | str,
    quiet: bool = False,
) -> Generator[tuple[EvaluationSample, torch.Tensor], None, None]:
    """Yield this rank's samples, each with its predicted train ids, uint8, H x W."""
    own, ranks = rank(), world_size()
    samples = evaluation_stream(
        manifest,
        own,
        ranks,
        classes=classes,
        class_map=config.evaluation.class_map,
        bands=backbone_options(config.model).bands,
        workers=config.data.workers,
        cache=config.data.cache,
    )
    was_training = model.training
    model.eval()
    try:
        with closing(samples):
            for sample in track(
                samples,
                "evaluating",
                total=len(range(own, manifest.samples, ranks)),
                console=plain_console(stderr=True),
                disable=quiet or own != 0,
            ):
                height, width = sample.image.shape[:2]
                pixels = image_pixels(sample.image, device)
                size = config.input_size(height, width)
                yield sample, predict(model, pixels, size, (height, width), config.evaluation)[0]
    finally:
        model.train(was_training)


def _in_order(images: list[ImageScores], manifest: Manifest) -> list[ImageScores]:
    """Gather the scores of all images in the order of the shards. Collective if torch.distributed is initialised."""
    order = {key: number for number, key in enumerate(key for shard in manifest.shards for key in shard.keys)}
    return sorted((line for part in gather_objects(images) for line in part), key=lambda line: order[line.key])
