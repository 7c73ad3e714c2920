"""Evaluate a network on a labelled shard folder, divided among ranks."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import nn

from dist_pca.classes import IGNORE_INDEX, ClassInfo, label_set_members
from dist_pca.config import RunConfig
from dist_pca.data.stream import evaluation_stream
from dist_pca.errors import UserError
from dist_pca.evaluation.confusion import confusion_matrix
from dist_pca.evaluation.inference import input_size, predict
from dist_pca.evaluation.label_files import cityscapes_ids, prediction_names, save_label
from dist_pca.evaluation.report import Scores, score
from dist_pca.files import new_folder
from dist_pca.shards.manifest import Manifest


def evaluate(
    model: nn.Module,
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    predictions: Path | None = None,
    quiet: bool = False,
) -> Scores:
    """Score a segmenter on every image of a shard folder, at the labels' original size.

    Collective if torch.distributed is initialised: images are divided among ranks and integer counts are summed, so
    every rank gets the same scores at any world size. The batch size is 1. The model's mode (training or evaluation)
    is restored.

    Args:
        model: A segmenter on `device`.
        manifest: Labelled shards.
        classes: The classes that the model was trained on, by train id; labels of others are ignored.
        config: The run: sizes, evaluation protocol, label sets and loader processes.
        device: Device of the model.
        rank: Rank, below `world_size`; rank 0 shows progress on stderr.
        world_size: Number of ranks.
        predictions: Folder to create atomically, for one PNG of each image at its label's size. Values are Cityscapes
            label ids, or train ids if one of `classes` is not in Cityscapes. Ranks must share its file system.
        quiet: Show no progress.

    Raises:
        UserError: the folder of predictions is not empty or cannot be written, the shards have no labels or none of
            the classes, a label set is not covered by `classes`, or a sample cannot be read.
    """
    if not manifest.labelled:
        raise UserError(f"shards {manifest.folder}: have no labels; evaluate on labelled shards")
    label_set_members(config.evaluation.label_sets, classes)
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    samples = evaluation_stream(
        manifest, rank, world_size, classes=classes, workers=config.data.workers, cache=config.data.cache
    )
    coding, names = cityscapes_ids(classes), prediction_names(manifest)
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(closing(samples))
            staged = predictions and stack.enter_context(new_folder(predictions, "--write-predictions"))
            for key, image, label in track(
                samples,
                f"evaluating {manifest.folder.name}",
                total=len(range(rank, manifest.samples, world_size)),
                console=Console(stderr=True),
                disable=quiet or rank != 0,
            ):
                pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
                truth = torch.from_numpy(label).to(device)
                size = (truth.shape[0], truth.shape[1])
                prediction = predict(model, pixels, input_size(config, *image.shape[:2]), size, config.evaluation)[0]
                counts += confusion_matrix(prediction, truth, len(classes), IGNORE_INDEX)
                if staged:
                    train_ids = prediction.cpu().numpy()
                    save_label(staged / f"{names[key]}.png", train_ids if coding is None else coding[train_ids])
                images += 1
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(images)
    return score(counts.cpu(), classes, int(images), config.evaluation.label_sets)
