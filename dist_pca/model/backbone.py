"""Backbones: any timm network that can give feature maps, for images of any size."""

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import cycle, islice
from typing import Any, NamedTuple

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


Size = tuple[int, int]
"""Height and width, in pixels."""
_WINDOWS = (1, 2, 4, 7, 8, 10, 12, 14, 16)
"""Edges of attention windows and blocks, in positions of the deepest map, whose multiples are tried as sizes."""
_SIZES_TRIED = 12


class BackboneOptions(NamedTuple):
    """What a backbone is built from."""

    name: str
    """Name in timm."""
    output_stride: int | None = None
    """Stride of the deepest map; None is the family's own."""
    image_size: Size | None = None
    """Size of images for which timm builds the network, its `img_size`; None is the network's own."""
    bands: int = 3
    """Bands of images, its `in_chans`."""


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
    """Mean of each band's values in 0..1 that the pretrained weights expect."""
    std: tuple[float, ...]
    """Standard deviation of each band's values in 0..1 that the pretrained weights expect."""

    def __init__(self, body: nn.Module, options: BackboneOptions, *, dilated: bool) -> None:
        super().__init__()
        self.body = body
        self.options = options
        info: Any = body.feature_info
        cfg: Any = body.pretrained_cfg
        self.channels = tuple(info.channels())
        self.strides = tuple(info.reduction())
        self.mean = _by_band(cfg["mean"], options.bands)
        self.std = _by_band(cfg["std"], options.bands)
        self.multiple = 1 if dilated else max(self.strides)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps, finest first, each B x C x h x w, of normalised images B x bands x H x W.

        Raises:
            UserError: the network cannot take images of this size.
        """
        given = images.shape[-2:]
        if self.multiple > 1:
            size = [_nearest_multiple(edge, self.multiple) for edge in given]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)  # type: ignore[arg-type]
        try:
            maps: list[torch.Tensor] = self.body(images)
        except (RuntimeError, AssertionError):
            if not images.is_meta:
                check_size(self.options, (given[0], given[1]), "data.crop or evaluation.window")
            raise
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            return [feature_map.permute(0, 3, 1, 2).contiguous() for feature_map in maps]
        return maps


def _by_band(rgb: Sequence[float], bands: int) -> tuple[float, ...]:
    """Statistics of RGB for bands: in turn, as timm repeats the weights of the first convolution; the mean for one."""
    return (sum(rgb) / len(rgb),) if bands == 1 else tuple(islice(cycle(rgb), bands))


def _nearest_multiple(edge: int, multiple: int) -> int | torch.SymInt:
    """The multiple, 1 at least, nearest to `edge`, of two the even one; in whole numbers, which tracers can follow."""
    count, rest = (2 * edge + multiple) // (2 * multiple), (2 * edge + multiple) % (2 * multiple)
    halfway = 1 - torch.sym_min(1, rest)
    return torch.sym_max(1, count - halfway * (count % 2)) * multiple


def check_size(options: BackboneOptions, size: Size, key: str, also: str = "") -> None:
    """Check, by a pass on meta tensors, that a backbone takes images of a size.

    Args:
        options: What the backbone is built from.
        size: Height and width of images.
        key: Config key that sets the size, with which the message begins.
        also: What else must be set with it.

    Raises:
        UserError: it does not; the message names sizes near this one that it takes.
    """
    own = options.image_size or tuple(_on_meta(options).body.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    # A network whose operations have no meta kernels fails at every size, which says nothing about this one.
    if takes_size(options, size) or not takes_size(options, own):
        return
    step = max(_on_meta(options).strides)
    near = {(_multiple_near(size[0], step * count), _multiple_near(size[1], step * count)) for count in _WINDOWS} | {
        (_multiple_near(size[0], own[0]), _multiple_near(size[1], own[1]))
    }
    by_distance = sorted(near - {own}, key=lambda other: sum(abs(a - b) for a, b in zip(other, size, strict=True)))
    fit = [other for other in by_distance[:_SIZES_TRIED] if takes_size(options, other)]
    named = " or ".join(f"[{height}, {width}]" for height, width in dict.fromkeys([*fit[:2], own]))
    raise UserError(
        f"{key}: {options.name} cannot take images of {size[0]} x {size[1]} pixels; set it to a size that it can take, "
        f"{named}{also}"
    )


def takes_size(options: BackboneOptions, size: Size) -> bool:
    """Whether timm can build a backbone and it gives feature maps for images of a size, by a pass on meta tensors."""
    try:
        with torch.no_grad():
            _on_meta(options)(torch.empty(1, options.bands, *size, device="meta"))
    except Exception:
        # Each family has its own type of error for a size that it cannot take.
        return False
    return True


def fit_image_size(options: BackboneOptions, crop: Size) -> BackboneOptions:
    """Build for the crop's size a backbone of a fixed size that cannot take the crop otherwise, if timm can.

    Args:
        options: What the backbone is built from.
        crop: Height and width of images in training.
    """
    if options.image_size is not None or takes_size(options, crop):
        return options
    multiple = max(_on_meta(options).strides)
    size = (_multiple_near(crop[0], multiple), _multiple_near(crop[1], multiple))
    fitted = options._replace(image_size=size)
    return fitted if takes_size(fitted, crop) else options


def _multiple_near(edge: int, multiple: int) -> int:
    return int(_nearest_multiple(edge, multiple))


@lru_cache(maxsize=4)
def _on_meta(options: BackboneOptions) -> Backbone:
    """Build a backbone without memory for its weights, in evaluation mode."""
    with torch.device("meta"):
        return build_backbone(*options).eval()


def build_backbone(
    name: str, output_stride: int | None, image_size: Size | None = None, bands: int = 3, drop_path: float = 0.0
) -> Backbone:
    """A timm network with random weights.

    Args:
        name: Its name in timm, with or without a tag of pretrained weights.
        output_stride: Stride of the deepest map; None leaves the family's own.
        image_size: Size of images for which timm builds the network; None leaves its own.
        bands: Bands of images.
        drop_path: Rate of stochastic depth in training.

    Raises:
        UserError: timm has no such network, it gives no feature maps, or its family cannot have this stride, size or
            stochastic depth.
    """
    if not timm.is_model(name):
        nearest = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0))
        raise UserError(f"model.backbone: timm has no network {name!r}; the nearest are {nearest}")
    options = BackboneOptions(name, output_stride, image_size, bands)
    # Not every family takes even a rate of 0.
    depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0 else {}
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    create = partial(_create, name) if bands == 3 else partial(_create, name, in_chans=bands)
    if output_stride is not None:
        try:
            body = create(output_stride=output_stride, **depth, **size)
            return Backbone(body, options, dilated=True)
        except (TypeError, AssertionError):
            # How timm's families say that they cannot dilate, or not to this stride; their own stride may be the one.
            pass
    try:
        backbone = Backbone(create(**depth, **size), options, dilated=False)
    except (TypeError, AssertionError) as error:
        if "img_size" in str(error) or (size and not depth):
            raise UserError(
                f"model.image_size: timm cannot build {name} for images of {image_size} pixels "
                f"({error or 'not this size'}); set it to null"
            ) from error
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


def _create(name: str, **options: Any) -> nn.Module:
    family = timm.models.model_entrypoint(name).__module__
    try:
        body: nn.Module = timm.create_model(name, features_only=True, **_OPTIONS.get(family, {}), **options)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"model.backbone: {name} cannot be built for feature maps ({error}); choose another timm network"
        ) from error
    return body
