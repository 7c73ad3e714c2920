"""The backbone as it was before training, for losses that keep the trained one near it."""

import copy

import torch
from torch import nn

from dist_pca.model.segmenter import Segmenter, normalised

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of a network's products under autocast by `training.precision`; None leaves fp32."""


class FrozenBackbone(nn.Module):
    """A copy of a segmenter's backbone with the weights that it has now, in evaluation mode and without gradients.

    The engine does not train, partition or save it: every rank has all of its weights in fp32 at any ZeRO stage,
    4 bytes per parameter (170 MB for a ResNet-101, 1.2 GB for a ViT-L), and no optimiser state. A forward pass
    keeps no activations for a backward pass.

    Args:
        segmenter: Its backbone is copied.
        autocast: Type of the forward pass's products; None leaves fp32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, segmenter: Segmenter, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(segmenter.backbone).eval().requires_grad_(False)
        self.autocast = autocast
        self.register_buffer("mean", segmenter.mean.clone())
        self.register_buffer("std", segmenter.std.clone())

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Deepest map, B x C x h x w, of images B x bands x H x W, uint8 or floating point in 0..1."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            deepest: torch.Tensor = self.backbone(normalised(images, self.mean, self.std))[-1]
        return deepest
