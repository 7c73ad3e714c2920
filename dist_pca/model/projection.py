"""Pixel features for association on a grid of their own: resized maps, and a projection of all of them."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import nn
from torch.nn import functional as F


def grid_size(feature_map: torch.Tensor, stride: float, grid_stride: int) -> list[int]:
    """Height and width of the grid of stride `grid_stride` that covers a map of stride `stride`, rounded up."""
    # Whole numbers, which tracers can follow; the one stride that is not whole is that of half a patch of 14 pixels.
    numerator, denominator = (Fraction(stride) / grid_stride).as_integer_ratio()
    return [-(-edge * numerator // denominator) for edge in feature_map.shape[-2:]]


def resize(feature_map: torch.Tensor, size: list[int], *, coarser: bool) -> torch.Tensor:
    """Resize a map B x C x h x w: to a coarser grid by the mean over each cell's area, to a finer one bilinearly."""
    if coarser:
        return F.interpolate(feature_map, size, mode="area")
    return F.interpolate(feature_map, size, mode="bilinear", align_corners=False)


class Projection(nn.Module):
    """Project all of a backbone's maps, resized to the association grid, to one map of pixel features.

    The maps, side by side, pass two 1 x 1 convolutions with group normalisation and ReLU between them (Chen et al.,
    "PiPa", 2023; Xie et al., "SePiCo", 2023), so no statistic is shared by the images of a batch.

    Args:
        channels: Channels of each feature map, finest first.
        strides: Stride of each feature map, finest first.
        width: Channels of the projection.
        stride: Pixels per position of the association grid.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.strides = tuple(strides)
        self.embeddings = nn.ModuleList(nn.Conv2d(wide, width, 1, bias=False) for wide in channels)
        self.output = nn.Sequential(
            nn.GroupNorm(math.gcd(32, width), width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pixel features B x width x h x w."""
        size = grid_size(maps[-1], self.strides[-1], self.stride)
        embedded = []
        for embed, feature_map, stride in zip(self.embeddings, maps, self.strides, strict=True):
            # A 1 x 1 convolution of maps side by side is the sum of one of each, and it commutes with resizing: the
            # convolution runs on the smaller map.
            if stride < self.stride:
                embedded.append(embed(resize(feature_map, size, coarser=True)))
            else:
                embedded.append(resize(embed(feature_map), size, coarser=False))
        projected: torch.Tensor = self.output(sum(embedded[1:], start=embedded[0]))
        return projected
