"""One network over one labelled shard folder, shared out over ranks."""

from collections.abc import Sequence
from contextlib import closing

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import nn

from dist_pca.config import RunConfig
from dist_pca.data.stream import evaluation_stream
from dist_pca.errors import UserError
from dist_pca.evaluation.confusion import confusion_matrix
from dist_pca.evaluation.inference import input_size, predict
from dist_pca.evaluation.report import Scores, label_set_members, score
from dist_pca.shards.classes import IGNORE_INDEX, ClassInfo
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
) -> Scores:
    """Score a segmenter on every image of a shard folder once, at the labels' own size.

    A collective call where torch.distributed is initialised: ranks share the images out and sum integer counts, so
    every rank gets the same scores, whatever the world size. Images pass one at a time. The model is left in the mode
    that it came in.

    Args:
        model: A segmenter on `device`.
        manifest: Labelled shards.
        classes: The classes that the model was trained on, by train id; labels of others are ignored.
        config: The run: sizes, label sets and loader processes.
        device: Where images are labelled.
        rank: Rank, below `world_size`; rank 0 shows progress on stderr.
        world_size: Number of ranks.

    Raises:
        UserError: the shards have no labels or none of the classes, a label set is not covered by `classes`, or a
            sample cannot be read.
    """
    if not manifest.labelled:
        raise UserError(f"shards {manifest.folder}: no labels to score against; evaluate on labelled shards")
    label_set_members(config.evaluation.label_sets, classes)
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    samples = evaluation_stream(manifest, rank, world_size, classes=classes, workers=config.data.workers)
    was_training = model.training
    model.eval()
    try:
        with closing(samples):
            for _, image, label in track(
                samples,
                f"evaluating {manifest.folder.name}",
                total=len(range(rank, manifest.samples, world_size)),
                console=Console(stderr=True),
                disable=rank != 0,
            ):
                pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
                truth = torch.from_numpy(label).to(device)
                prediction = predict(
                    model, pixels, input_size(config, *image.shape[:2]), (truth.shape[0], truth.shape[1])
                )
                counts += confusion_matrix(prediction[0], truth, len(classes), IGNORE_INDEX)
                images += 1
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(images)
    return score(counts.cpu(), classes, int(images), config.evaluation.label_sets)
