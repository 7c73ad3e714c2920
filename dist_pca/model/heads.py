"""Heads: a backbone's feature maps in, class logits and the map they are read from out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class HeadOutput(NamedTuple):
    """What a head says about a batch."""

    logits: torch.Tensor
    """B x K x h x w."""
    features: torch.Tensor
    """B x C x h x w, what the classifier reads."""


class DeepLabV2Head(nn.Module):
    """Atrous spatial pyramid pooling on the deepest map: the sum of four dilated 3 x 3 convolutions (DeepLab-v2).

    Args:
        channels: Channels of the deepest map.
        num_classes: Number of classes K.
    """

    dilations = (6, 12, 18, 24)

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=dilation, dilation=dilation) for dilation in self.dilations
        )
        for branch in self.branches:
            _start_undecided(branch)

    def forward(self, maps: Sequence[torch.Tensor]) -> HeadOutput:
        """Logits at the resolution of `maps[-1]`, which is also what the classifier reads."""
        deepest = maps[-1]
        first, *others = (branch(deepest) for branch in self.branches)
        return HeadOutput(sum(others, start=first), deepest)


class MultiScaleHead(nn.Module, ABC):
    """Base of the heads that fuse several scales at the finest of them and classify the result by a 1 x 1 convolution.

    The scales are the backbone's maps of `stride` and more, or its coarsest maps where all are finer. Where all maps
    have one stride, as those of a plain transformer, and it is coarser than `stride`, a `SimpleFeaturePyramid` makes
    the finer scales. Group normalisation keeps these heads free of batch statistics, whatever model.batch_norm says.

    Args:
        channels: Channels of each feature map, finest first.
        strides: Stride of each feature map, finest first.
        width: Channels of every scale inside the head and of the classifier's input.
        num_classes: Number of classes K.
        stride: Pixels per position of the logits, where the backbone allows it.
    """

    stride: float
    """Pixels per position that the logits really have."""
    scale_channels: tuple[int, ...]
    """Channels of each scale that is fused, finest first."""
    scale_strides: tuple[float, ...]
    """Pixels per position of each scale that is fused, finest first."""

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], width: int, num_classes: int, stride: int = 4
    ) -> None:
        super().__init__()
        # A patch of 14 pixels is no power of two times 4: the nearest count of doublings gives 3.5.
        doublings = round(math.log2(strides[0] / stride)) if len(set(strides)) == 1 else 0
        self.first_map = 0
        self.neck: SimpleFeaturePyramid | None = None
        if doublings > 0:
            self.neck = SimpleFeaturePyramid(channels, width, doublings)
            self.scale_channels = (width,) * (doublings + 1)
            self.scale_strides = tuple(strides[0] / 2**step for step in range(doublings, -1, -1))
        else:
            self.first_map = sum(finer < min(stride, max(strides)) for finer in strides)
            self.scale_channels = tuple(channels[self.first_map :])
            self.scale_strides = tuple(strides[self.first_map :])
        self.stride = self.scale_strides[0]
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _start_undecided(self.classifier)
        self._add_layers(width)

    def forward(self, maps: Sequence[torch.Tensor]) -> HeadOutput:
        """Logits and the classifier's input, both of `self.stride`."""
        features = self.fuse(maps[self.first_map :] if self.neck is None else self.neck(maps))
        return HeadOutput(self.classifier(features), features)

    @abstractmethod
    def _add_layers(self, width: int) -> None:
        """Add the layers that `fuse` needs, for scales of `scale_channels` and `scale_strides`."""

    @abstractmethod
    def fuse(self, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """One map B x width x h x w of the finest scale from all, finest first."""


class PyramidHead(MultiScaleHead):
    """Feature pyramid: all scales are projected to one width and added from the coarsest to the finest.

    The sum passes a depthwise-separable 3 x 3 convolution (Lin et al., "Feature Pyramid Networks", 2017, with one
    convolution at the end in place of one per level). Arguments are those of `MultiScaleHead`.
    """

    def _add_layers(self, width: int) -> None:
        self.laterals = _embeddings(self.scale_channels, width)
        self.refine = nn.Sequential(_group_norm(width), nn.ReLU(), *_separable(width, width))

    def fuse(self, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """One map B x width x h x w of the finest scale from all, finest first."""
        *finer, merged = (lateral(scale) for lateral, scale in zip(self.laterals, scales, strict=True))
        for lateral in reversed(finer):
            merged = lateral + _upsampled(merged, lateral)
        refined: torch.Tensor = self.refine(merged)
        return refined


class DAFormerHead(MultiScaleHead):
    """Context-aware fusion: scales side by side, seen by depthwise-separable convolutions of several dilations.

    Every scale is embedded by a 1 x 1 convolution and resized to the finest; a 1 x 1 convolution fuses what the
    dilated ones give (Hoyer et al., "DAFormer", CVPR 2022, section 3.2). Dilations of 1, 6, 12 and 18 are meant for
    stride 4; at coarser strides they shrink, so that they reach as many pixels. Arguments are those of
    `MultiScaleHead`.
    """

    dilations = (1, 6, 12, 18)

    def _add_layers(self, width: int) -> None:
        self.embeddings = _embeddings(self.scale_channels, width)
        self.branches = nn.ModuleList(
            nn.Sequential(*_separable(len(self.embeddings) * width, width, max(1, round(dilation * 4 / self.stride))))
            for dilation in self.dilations
        )
        self.merge = _fusion(len(self.branches) * width, width)

    def fuse(self, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """One map B x width x h x w of the finest scale from all, finest first."""
        stacked = _stacked(self.embeddings, scales)
        merged: torch.Tensor = self.merge(torch.cat([branch(stacked) for branch in self.branches], dim=1))
        return merged


class MLPHead(MultiScaleHead):
    """All-MLP decoder: every scale is projected linearly and resized to the finest, and a linear layer fuses them.

    Linear layers over channels are 1 x 1 convolutions (Xie et al., "SegFormer", NeurIPS 2021, section 3.2). Arguments
    are those of `MultiScaleHead`.
    """

    def _add_layers(self, width: int) -> None:
        self.embeddings = _embeddings(self.scale_channels, width)
        self.merge = _fusion(len(self.embeddings) * width, width)

    def fuse(self, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """One map B x width x h x w of the finest scale from all, finest first."""
        merged: torch.Tensor = self.merge(_stacked(self.embeddings, scales))
        return merged


class SimpleFeaturePyramid(nn.Module):
    """Finer scales for a backbone whose maps all have one stride.

    The maps are fused to one, from which transposed 2 x 2 convolutions make one scale after the other, each twice as
    fine (after Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022, section 3). No
    coarser scale is made: each position of a transformer's map already sees the whole image.

    Args:
        channels: Channels of each feature map.
        width: Channels of every scale.
        doublings: Number of finer scales.
    """

    def __init__(self, channels: Sequence[int], width: int, doublings: int) -> None:
        super().__init__()
        self.merge = _fusion(sum(channels), width)
        self.doublings = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2, bias=False), _group_norm(width), nn.ReLU())
            for _ in range(doublings)
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Scales, finest first, each B x width x h x w."""
        scales = [self.merge(torch.cat(list(maps), dim=1))]
        for double in self.doublings:
            scales.insert(0, double(scales[0]))
        return scales


Head = DeepLabV2Head | MultiScaleHead
"""Any head."""

MULTI_SCALE_HEADS: dict[str, type[MultiScaleHead]] = {"pyramid": PyramidHead, "daformer": DAFormerHead, "mlp": MLPHead}
"""Heads that fuse scales, by their name in `model.head`."""


def _embeddings(channels: Sequence[int], width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(wide, width, 1) for wide in channels)


def _separable(channels: int, width: int, dilation: int = 1) -> list[nn.Module]:
    depthwise = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False)
    return [depthwise, nn.Conv2d(channels, width, 1, bias=False), _group_norm(width), nn.ReLU()]


def _fusion(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), _group_norm(width), nn.ReLU())


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, width), width)


def _stacked(embeddings: nn.ModuleList, scales: Sequence[torch.Tensor]) -> torch.Tensor:
    finest, *coarser = (embed(scale) for embed, scale in zip(embeddings, scales, strict=True))
    return torch.cat([finest, *(_upsampled(scale, finest) for scale in coarser)], dim=1)


def _upsampled(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(scale, like.shape[-2:], mode="bilinear", align_corners=False)


def _start_undecided(classifier: nn.Module) -> None:
    # Small weights start every class near probability 1/K.
    assert isinstance(classifier, nn.Conv2d)
    assert classifier.bias is not None
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
