"""One training step of the network, run on tensors that have shapes and no values."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from dist_pca.association import diffuse
from dist_pca.config import RunConfig
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective import Domain, objective
from dist_pca.objective.objective import SIMILARITY
from dist_pca.planning.live import LiveBytes
from dist_pca.shards.classes import LABEL_SETS
from dist_pca.training.optimizer import build_optimizer

DEFAULT_CLASSES = 19
"""Where neither the config nor shards that are there say how many."""

LOW_PRECISION_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Under autocast DeepSpeed moves the gradients of these very classes, and of no subclass, in the low precision."""


class Parameter(NamedTuple):
    """A trained parameter."""

    elements: int
    low: bool
    """It belongs to one of `LOW_PRECISION_MODULES`."""


@dataclass(frozen=True)
class NetworkStep:
    """What one micro-batch on one rank costs, without the terms whose cost depends on the other ranks."""

    groups: tuple[tuple[Parameter, ...], ...]
    """Trained parameters, by parameter group of the optimiser."""
    frozen_bytes: int
    """Of parameters that are not trained."""
    buffer_bytes: int
    """Of buffers, such as running statistics."""
    batch_norms: tuple[int, ...]
    """Channels of each batch norm."""
    phases: tuple[tuple[str, int], ...]
    """In the order of time: (phase, most bytes of activations and images that are alive in it). Phases are `forward`,
    then each term of the objective by name, then `NAME backward` in reverse, then `backward`, the network's own."""
    features: tuple[int, int, int]
    """Channels, height and width of an image's features."""
    logits: tuple[int, int, int]
    """Classes, height and width of an image's logits."""
    convolution_flops: int
    """Operations of convolutions in a forward and a backward pass, a multiplication and an addition counting two."""
    product_flops: int
    """Likewise of matrix products and attention."""

    @property
    def parameters(self) -> int:
        """Trained elements."""
        return sum(parameter.elements for group in self.groups for parameter in group)


def class_count(config: RunConfig) -> int | None:
    """Classes of a run, as far as its config says without looking at shards."""
    classes = config.data.classes
    if isinstance(classes, str):
        if classes not in LABEL_SETS:
            raise UserError(f"data.classes: no label set {classes!r}; there are {', '.join(LABEL_SETS)}")
        return len(LABEL_SETS[classes])
    return None if classes is None else len(classes)


def run_network(config: RunConfig, classes: int, source_images: int, target_images: int) -> NetworkStep:
    """Run forward, objective and backward of one micro-batch on fake tensors, which takes seconds and no memory.

    Every operation of the real network goes past: with autocast, activation checkpointing and the head that the config
    names. Lovasz and association, whose cost depends on other ranks, are passed by: their inputs are made and their
    gradients come back, and what is between is for the caller to add to the phase of their name.

    Args:
        config: The run.
        classes: Number of classes.
        source_images: In one rank's micro-batch.
        target_images: Likewise; 0 where the run does not adapt.

    Raises:
        UserError: the network cannot be built.
    """
    plain = config.model.model_copy(update={"weights": "scratch", "compile": False})
    real = build_segmenter(plain, classes).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model = real.to_empty(device="cpu").train()
        model.zero_grad()
        resting = live.bytes
        for parameter in model.parameters():
            if parameter.requires_grad:
                # DeepSpeed's hooks move every gradient into its buckets as soon as it is there.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        live.begin("forward")
        live.peaks.clear()
        with FlopCounterMode(display=False) as counter:
            loss, shapes = _forward(config, model, live, source_images, target_images)
            loss.backward()  # type: ignore[no-untyped-call]
    low = {
        id(parameter)
        for module in model.modules()
        if type(module) in LOW_PRECISION_MODULES
        for parameter in module.parameters(recurse=False)
    }
    flops: dict[Any, int] = dict(counter.get_flop_counts()["Global"])
    convolutions = sum(count for operation, count in flops.items() if "convolution" in str(operation))
    return NetworkStep(
        groups=tuple(
            tuple(Parameter(parameter.numel(), id(parameter) in low) for parameter in group["params"])
            for group in build_optimizer(config.optimizer, model).param_groups
        ),
        frozen_bytes=sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        batch_norms=tuple(layer.num_features for layer in model.modules() if isinstance(layer, _BatchNorm)),
        phases=tuple((phase, peak - resting) for phase, peak in live.peaks.items()),
        features=shapes[0],
        logits=shapes[1],
        convolution_flops=convolutions,
        product_flops=sum(flops.values()) - convolutions,
    )


def _forward(
    config: RunConfig, model: Segmenter, live: LiveBytes, source_images: int, target_images: int
) -> tuple[torch.Tensor, tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """The loss of a micro-batch, and the shapes of one image's features and logits."""
    low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.training.precision]
    images = [torch.zeros(n, 3, *config.data.crop, dtype=torch.uint8) for n in (source_images, target_images) if n]
    labels = [torch.zeros(len(batch), *config.data.crop, dtype=torch.uint8) for batch in images]
    with nullcontext() if low is None else torch.autocast("cpu", low):
        batches = [torch.cat(images)] if config.model.joint_batch and len(images) > 1 else images
        outputs = [model(batch) for batch in batches]
    begin_backward = _noting(live, "backward")
    outputs = [[begin_backward(x) for x in output] for output in outputs]
    if len(outputs) < len(images):
        logits, features = ((x[:source_images], x[source_images:]) for x in outputs[0])
    else:
        logits, features = zip(*outputs, strict=True)
    source, *targets = (Domain(*of_domain) for of_domain in zip(logits, features, labels, strict=True))
    shapes = (tuple(source.features.shape[1:]), tuple(source.logits.shape[1:]))
    del images, batches, outputs, logits, features

    live.begin("objective")
    without = {
        part: getattr(config.objective, part).model_copy(update={"weight": 0.0}) for part in ("lovasz", "association")
    }
    target = targets[0] if targets else None
    loss, _ = objective(config.objective.model_copy(update=without), source, target, step=0)
    full = F.interpolate(source.logits.float(), size=config.data.crop, mode="bilinear", align_corners=False)
    if config.objective.lovasz.weight > 0:
        pixels = full.softmax(dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        loss = loss + _noting(live, "lovasz")(pixels)[0, 0] * 0
    if target is not None and config.objective.association.weight > 0:
        association = config.objective.association
        for level in association.levels:
            live.begin(f"association {level}")
            source_rows, target_rows = (
                (x.features.float() if level == "features" else x.logits.float().softmax(dim=1)).flatten(2).mT
                for x in (source, target)
            )
            if association.diffusion > 0:
                target_rows = diffuse(
                    target_rows,
                    association.diffusion,
                    SIMILARITY[level],
                    detach_statistics=association.detach_statistics,
                )
            both = _noting(live, f"association {level}")
            loss = loss + sum(both(torch.cat(list(rows)))[0, 0] * 0 for rows in (source_rows, target_rows))
    return loss, shapes  # type: ignore[return-value]


def _noting(live: LiveBytes, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives back its argument, and notes when it passes forward and when its gradient comes back."""

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            if name != "backward":
                live.begin(name)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            live.begin(name if name == "backward" else f"{name} backward")
            return gradients[0]

    return Note.apply  # type: ignore[no-any-return]


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
