"""One training step of the network, run on tensors that have shapes and no values."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from dist_pca.association import diffuse
from dist_pca.classes import LABEL_SETS
from dist_pca.config import RunConfig
from dist_pca.data.collate import Batch
from dist_pca.errors import UserError
from dist_pca.model.frozen import AUTOCAST, FrozenBackbone
from dist_pca.model.segmenter import Output, Segmenter, backbone_options, build_segmenter, fit_to_crop
from dist_pca.objective import Domains, objective
from dist_pca.objective.cycle_association import SIMILARITY
from dist_pca.objective.grid import pixels_at
from dist_pca.tools.planning.live import LiveBytes
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.views import forward_views, student_views

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
    """Bytes of parameters that are not trained, including the frozen backbone of the feature distance."""
    buffer_bytes: int
    """Bytes of buffers, such as running statistics."""
    batch_norms: tuple[int, ...]
    """Channels of each batch norm."""
    phases: tuple[tuple[str, int], ...]
    """In the order of time: (phase, most bytes of activations and images that are alive in it). Phases are `teacher` if
    the objective has one, `forward`, then each term of the objective by name, then `NAME backward` in reverse, then
    the network's own: `backward`, and `gradients` from the first parameter's gradient on."""
    passes: int
    """Forward passes of the student: 1 for all images as one batch, else one for each domain."""
    features: tuple[int, int, int]
    """Channels, height and width of an image's features."""
    logits: tuple[int, int, int]
    """Classes, height and width of an image's logits."""
    convolution_flops: int
    """Operations of convolutions, a multiplication and an addition counting two: the teacher's forward pass, and the
    student's forward and backward pass."""
    product_flops: int
    """Operations of matrix products and attention, counted in the same way."""
    backward_flops: int
    """Operations of the backward pass, out of all operations."""

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

    Every operation of the real network goes past, on all that student and teacher are shown: with autocast, activation
    checkpointing and the head that the config names. Lovasz and association, whose cost depends on other ranks, are
    passed by: their inputs are made and their gradients come back, and what is between is for the caller to add to the
    phase of their name. Source contrast, which draws a few pixels, is left out.

    Args:
        config: The run.
        classes: Number of classes.
        source_images: In one rank's micro-batch.
        target_images: In one rank's micro-batch; 0 where the run does not adapt.

    Raises:
        UserError: the network cannot be built.
    """
    fitted = fit_to_crop(config.model, config.data.crop)
    plain = fitted.model_copy(update={"weights": "scratch", "compile": False})
    with torch.device("meta"):
        real = build_segmenter(plain, classes)
    real.gives_deepest = config.objective.feature_distance.weight > 0
    copy = FrozenBackbone(real, autocast=AUTOCAST[config.training.precision]) if real.gives_deepest else None
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model = real.to_empty(device="cpu").train()
        pretrained = None if copy is None else copy.to_empty(device="cpu")
        model.zero_grad()
        resting = live.bytes
        for parameter in model.parameters():
            if parameter.requires_grad:
                # DeepSpeed's hooks move every gradient into its buckets as soon as it is there. Buckets are made for
                # the first one, which is whole only when all passes have come to that parameter.
                parameter.register_post_accumulate_grad_hook(partial(_drop_gradient, live))  # type: ignore[no-untyped-call]
        live.peaks.clear()
        with FlopCounterMode(display=False) as counter:
            # Images and the network's outputs live as long as the step.
            step = _forward(config, model, pretrained, live, source_images, target_images)
            forward_flops = counter.get_total_flops()
            step.loss.backward()  # type: ignore[no-untyped-call]
    low = {
        id(parameter)
        for module in model.modules()
        if type(module) in LOW_PRECISION_MODULES
        for parameter in module.parameters(recurse=False)
    }
    flops: dict[Any, int] = dict(counter.get_flop_counts()["Global"])
    networks = [model] if pretrained is None else [model, pretrained]
    untrained = [p for network in networks for p in network.parameters() if not p.requires_grad]
    buffers = [buffer for network in networks for buffer in network.buffers()]
    convolutions = sum(count for operation, count in flops.items() if "convolution" in str(operation))
    return NetworkStep(
        groups=tuple(
            tuple(Parameter(parameter.numel(), id(parameter) in low) for parameter in group["params"])
            for group in build_optimizer(config.optimizer, model).param_groups
        ),
        frozen_bytes=sum(parameter.nbytes for parameter in untrained),
        buffer_bytes=sum(buffer.nbytes for buffer in buffers),
        batch_norms=tuple(layer.num_features for layer in model.modules() if isinstance(layer, _BatchNorm)),
        phases=tuple((phase, peak - resting) for phase, peak in live.peaks.items()),
        passes=step.passes,
        features=_image_shape(step.domains.source.features),
        logits=_image_shape(step.domains.source.logits),
        convolution_flops=convolutions,
        product_flops=sum(flops.values()) - convolutions,
        backward_flops=sum(flops.values()) - forward_flops,
    )


class _Step(NamedTuple):
    """A micro-batch that is ready for backward, and what is alive beside it."""

    loss: torch.Tensor
    domains: Domains
    batches: tuple[Batch, Batch | None]
    passes: int


def _forward(
    config: RunConfig,
    model: Segmenter,
    pretrained: FrozenBackbone | None,
    live: LiveBytes,
    source_images: int,
    target_images: int,
) -> _Step:
    low = AUTOCAST[config.training.precision]
    begin_backward = _noting(live, "backward")

    def network(images: torch.Tensor) -> Output:
        with torch.autocast("cpu", low, enabled=low is not None):
            output = model(images)
        return Output(*(None if values is None else begin_backward(values) for values in output))  # type: ignore[arg-type]

    @contextmanager
    def as_teacher() -> Iterator[None]:
        with torch.no_grad():
            model.eval()
            yield
            model.train()

    live.begin("teacher" if config.objective.uses_teacher else "forward")
    source = _batch(config, source_images)
    target = _batch(config, target_images) if target_images else None
    # By the last step every term has started.
    views = student_views(config, source, target, network, as_teacher, pretrained, mean=model.mean, step=sys.maxsize)
    live.begin("forward")
    domains = forward_views(network, views, joint=config.model.joint_batch)
    passes = 1 if config.model.joint_batch else sum(view is not None for view in views)
    return _Step(_loss(config, domains, live), domains, (source, target), passes)


def _batch(config: RunConfig, count: int) -> Batch:
    images = torch.zeros(count, backbone_options(config.model).bands, *config.data.crop, dtype=torch.uint8)
    labels = torch.zeros(count, *config.data.crop, dtype=torch.uint8)
    return Batch(images, labels, keys=[""] * count, indices=list(range(count)), skipped=[])


def _loss(config: RunConfig, domains: Domains, live: LiveBytes) -> torch.Tensor:
    """The objective, with all its terms; Lovasz and association are passed by."""
    live.begin("objective")
    without = {
        part: getattr(config.objective, part).model_copy(update={"weight": 0.0})
        for part in ("lovasz", "association", "source_contrast", "class_statistics", "feature_distance")
    }
    # Terms that start late are there from some step on.
    loss, _ = objective(
        config.objective.model_copy(update=without), *domains, step=config.objective.self_training.start_step
    )
    source, target = domains.source, domains.target
    full = F.interpolate(source.logits.float(), size=config.data.crop, mode="bilinear", align_corners=False)
    if config.objective.lovasz.weight > 0:
        pixels = full.softmax(dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        loss = loss + _noting(live, "lovasz")(pixels)[0, 0] * 0
    if source.deepest is not None and source.pretrained is not None:
        loss = loss + torch.linalg.vector_norm(source.deepest.float() - source.pretrained, dim=1).sum() * 0
    association = config.objective.association
    if target is not None and association.weight > 0:
        for level in association.levels:
            live.begin(f"association {level}")
            grid = source.features.shape[-2:]
            source_pixels, target_pixels = (
                pixels_at(level, domain.features, domain.logits, grid) for domain in (source, target)
            )
            if association.diffusion > 0:
                target_pixels = diffuse(
                    target_pixels,
                    association.diffusion,
                    SIMILARITY[level],
                    detach_statistics=association.detach_statistics,
                )
            # A teacher's pixels that choose the matches are there as long as these are sought.
            guides = [
                torch.cat(list(pixels_at(level, domain.teacher_features, domain.teacher_logits, grid)))
                for domain in (source, target)
                if association.teacher_matches
                and domain.teacher_features is not None
                and domain.teacher_logits is not None
            ]
            both = _noting(live, f"association {level}")
            loss = loss + sum(both(torch.cat(list(pixels)))[0, 0] * 0 for pixels in (source_pixels, target_pixels))
            del guides
    return loss


def _image_shape(values: torch.Tensor) -> tuple[int, int, int]:
    _, channels, height, width = values.shape
    return channels, height, width


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


def _drop_gradient(live: LiveBytes, parameter: torch.Tensor) -> None:
    live.begin("gradients")
    parameter.grad = None
