"""Validation during training: the score that `dist-pca evaluate` would give the next checkpoint."""

from collections.abc import Callable, Iterable, Sequence

import torch

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.evaluation.evaluate import evaluate
from dist_pca.model.segmenter import build_network
from dist_pca.shards.manifest import Manifest


def validate(
    tensors: Iterable[tuple[str, torch.Tensor]],
    manifest: Manifest,
    classes: Sequence[ClassInfo],
    config: RunConfig,
    *,
    device: torch.device,
    progress: Callable[[], object],
) -> tuple[float, tuple[float, ...]]:
    """Compute the mean IoU of a network on labelled shards, and the IoU of each class, which is nan for an absent one.

    Collective; images are divided over ranks. Each rank builds a full copy of the network, since under ZeRO 3 ranks
    with different numbers of images would wait for each other's parameters.

    Args:
        tensors: The network's parameters and buffers by name, as a checkpoint stores them.
        manifest: The shards.
        classes: Classes by train id.
        config: The run.
        device: Device of this rank.
        progress: Called for every image.

    Raises:
        UserError: as `evaluate` does.
    """
    network = build_network(config.model, len(classes)).to(device)
    state = network.state_dict()
    for name, value in tensors:
        state[name].copy_(value)
    network.register_forward_pre_hook(lambda *_: progress() and None)
    scores = evaluate(network, manifest, classes, config, device=device, quiet=True)
    return scores.mean_iou, scores.iou
