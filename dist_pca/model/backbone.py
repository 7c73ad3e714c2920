"""Backbones: any timm network that can give feature maps, for images of any size."""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn
from torch.nn import functional as F

from dist_pca.errors import UserError

# A plain transformer's blocks are read through its final norm, as its own classifier reads them.
_TRANSFORMER = {"dynamic_img_size": True, "feature_cls": partial(FeatureGetterNet, norm=True)}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "timm.models.vision_transformer": _TRANSFORMER,
    "timm.models.deit": _TRANSFORMER,
    "timm.models.eva": _TRANSFORMER,
    "timm.models.swin_transformer": {"strict_img_size": False},
    "timm.models.swin_transformer_v2": {"strict_img_size": False},
}
"""What lifts a family's fixed input size, by the timm module that defines it; other families have none to lift."""


class Backbone(nn.Module):
    """A timm network that gives feature maps.

    Dilated networks are fully convolutional and take images as they are. The others, whose patches or windows must
    tile the image, see it resized bilinearly to the nearest multiple of their stride: unlike padding, that keeps every
    map aligned with the whole image.
    """

    channels: tuple[int, ...]
    """Channels of each map, finest first."""
    strides: tuple[int, ...]
    """Pixels per position of each map, finest first."""
    mean: tuple[float, ...]
    """Mean of the RGB values in 0..1 that the pretrained weights expect."""
    std: tuple[float, ...]
    """Standard deviation of the RGB values in 0..1 that the pretrained weights expect."""

    def __init__(self, body: nn.Module, *, dilated: bool) -> None:
        super().__init__()
        self.body = body
        info: Any = body.feature_info
        cfg: Any = body.pretrained_cfg
        self.channels = tuple(info.channels())
        self.strides = tuple(info.reduction())
        self.mean = tuple(cfg["mean"])
        self.std = tuple(cfg["std"])
        self.multiple = 1 if dilated else max(self.strides)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps, finest first, each B x C x h x w, of normalised images B x 3 x H x W."""
        if self.multiple > 1:
            size = [_nearest_multiple(edge, self.multiple) for edge in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)  # type: ignore[arg-type]
        maps: list[torch.Tensor] = self.body(images)
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            return [feature_map.permute(0, 3, 1, 2).contiguous() for feature_map in maps]
        return maps


def _nearest_multiple(edge: int, multiple: int) -> int | torch.SymInt:
    """The multiple, 1 at least, nearest to `edge`, of two the even one; in whole numbers, which tracers can follow."""
    count, rest = (2 * edge + multiple) // (2 * multiple), (2 * edge + multiple) % (2 * multiple)
    halfway = 1 - torch.sym_min(1, rest)
    return torch.sym_max(1, count - halfway * (count % 2)) * multiple


def build_backbone(name: str, output_stride: int | None, drop_path: float = 0.0) -> Backbone:
    """A timm network with random weights.

    Args:
        name: Its name in timm, with or without a tag of pretrained weights.
        output_stride: Stride of the deepest map; None leaves the family's own.
        drop_path: Rate of stochastic depth in training.

    Raises:
        UserError: timm has no such network, it gives no feature maps, or its family cannot have this stride or
            stochastic depth.
    """
    if not timm.is_model(name):
        nearest = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0))
        raise UserError(f"model.backbone: timm has no network {name!r}; the nearest are {nearest}")
    # Not every family takes even a rate of 0.
    depth = {"drop_path_rate": drop_path} if drop_path > 0 else {}
    if output_stride is not None:
        try:
            return Backbone(_create(name, output_stride=output_stride, **depth), dilated=True)
        except (TypeError, AssertionError):
            # How timm's families say that they cannot dilate, or not to this stride; their own stride may be the one.
            pass
    try:
        backbone = Backbone(_create(name, **depth), dilated=False)
    except TypeError as error:
        if not depth:
            raise
        raise UserError(f"model.drop_path: timm's {name} takes none ({error}); set it to 0") from error
    if output_stride not in (None, backbone.strides[-1]):
        raise UserError(
            f"model.output_stride: {name} cannot have {output_stride}; its own stride is {backbone.strides[-1]}, "
            "which null takes"
        )
    return backbone


def checkpoint_activations(backbone: Backbone, name: str) -> None:
    """Keep only some activations for backward and compute the others anew, as timm does it for the family.

    Raises:
        UserError: timm does not.
    """
    body: Any = backbone.body
    # A plain transformer lies inside what reads its blocks.
    body = body if hasattr(body, "set_grad_checkpointing") else getattr(body, "model", body)
    try:
        body.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"model.activation_checkpointing: timm cannot checkpoint {name} ({error}); set it to false"
        ) from error


def _create(name: str, **options: float) -> nn.Module:
    family = timm.models.model_entrypoint(name).__module__
    try:
        body: nn.Module = timm.create_model(name, features_only=True, **_OPTIONS.get(family, {}), **options)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"model.backbone: {name} cannot be built for feature maps ({error}); choose another timm network"
        ) from error
    return body
