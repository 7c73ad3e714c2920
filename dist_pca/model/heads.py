"""Heads: a backbone's feature maps in, class logits and the map they are read from out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

_PYRAMID_STRIDE = 8


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


class PyramidHead(nn.Module):
    """Feature pyramid: maps of stride 8 and more are projected to one width and added from the deepest upwards.

    The sum, at the finest of these strides, passes a depthwise-separable 3 x 3 convolution and a 1 x 1 classifier.
    Group normalisation keeps it free of batch statistics, whatever model.batch_norm says.

    Args:
        channels: Channels of each feature map, finest first.
        strides: Stride of each feature map, finest first.
        width: Channels of the projections and of the classifier's input.
        num_classes: Number of classes K.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        fine_maps = sum(stride < _PYRAMID_STRIDE for stride in strides)
        self.first_map = min(fine_maps, len(strides) - 1)
        self.laterals = nn.ModuleList(nn.Conv2d(wide, width, 1) for wide in channels[self.first_map :])
        groups = math.gcd(32, width)
        self.refine = nn.Sequential(
            nn.GroupNorm(groups, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _start_undecided(self.classifier)

    def forward(self, maps: Sequence[torch.Tensor]) -> HeadOutput:
        """Logits and the classifier's input at the finest stride of 8 or more."""
        *finer, deepest = (
            lateral(feature_map) for lateral, feature_map in zip(self.laterals, maps[self.first_map :], strict=True)
        )
        merged = deepest
        for lateral in reversed(finer):
            merged = lateral + F.interpolate(merged, lateral.shape[-2:], mode="bilinear", align_corners=False)
        features = self.refine(merged)
        return HeadOutput(self.classifier(features), features)


def _start_undecided(classifier: nn.Module) -> None:
    # Small weights start every class near probability 1/K.
    assert isinstance(classifier, nn.Conv2d)
    assert classifier.bias is not None
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
