"""The network of a run: images in, class logits and pixel features out."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn
from typing_extensions import Self

from dist_pca.model.backbone import Backbone, build_backbone
from dist_pca.model.batch_norm import hold_statistics, synchronise
from dist_pca.model.heads import DeepLabV2Head, PyramidHead
from dist_pca.model.weights import load_weights

if TYPE_CHECKING:
    from dist_pca.config import ModelConfig


class Output(NamedTuple):
    """What a network says about a batch of B images."""

    logits: torch.Tensor
    """Class scores before softmax, B x K x h x w."""
    features: torch.Tensor
    """Pixel features for association, B x C x h' x w'."""


class Segmenter(nn.Module):
    """Backbone and head. Normalisation of images is inside, so batches travel as uint8.

    Args:
        backbone: Gives feature maps, finest first.
        head: Reads them; gives logits and what its classifier reads.
        association_features: Which pixel features are given out: the deepest map or what the classifier reads.
        frozen_batch_norm: Keep running statistics as they are, in training mode too.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: DeepLabV2Head | PyramidHead,
        *,
        association_features: Literal["backbone", "head"] = "backbone",
        frozen_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.association_features = association_features
        self.frozen_batch_norm = frozen_batch_norm
        # Saved with the weights, which mean nothing under another normalisation.
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> Output:
        """Segment RGB images B x 3 x H x W, uint8 or floating point in 0..1."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        # Convolutions run about 1.3 times as fast on channels-last maps, on CPU and GPU.
        maps = self.backbone(((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last))
        logits, read_by_classifier = self.head(maps)
        return Output(logits, maps[-1] if self.association_features == "backbone" else read_by_classifier)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_batch_norm:
            hold_statistics(self)
        return self


def build_segmenter(config: "ModelConfig", num_classes: int) -> Segmenter:
    """The network that a config describes, with its backbone's weights loaded and its head drawn at random.

    Raises:
        UserError: timm has no such backbone, it cannot have the output stride, or its weights cannot be had or do not
            fit.
    """
    backbone = build_backbone(config.backbone, config.output_stride)
    load_weights(backbone.body, config.backbone, config.weights)
    if config.batch_norm == "sync":
        synchronise(backbone)
    head: DeepLabV2Head | PyramidHead
    if config.head == "deeplab_v2":
        head = DeepLabV2Head(backbone.channels[-1], num_classes)
    else:
        head = PyramidHead(backbone.channels, backbone.strides, config.head_channels, num_classes)
    return Segmenter(
        backbone,
        head,
        association_features=config.association_features,
        frozen_batch_norm=config.batch_norm == "frozen",
    ).train()
