"""The network of a run: images in, class logits and pixel features out."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn
from typing_extensions import Self

from dist_pca.model.backbone import (
    Backbone,
    BackboneOptions,
    Size,
    build_backbone,
    checkpoint_activations,
    fit_image_size,
)
from dist_pca.model.batch_norm import hold_statistics, synchronise, track_forward_only
from dist_pca.model.depthwise import use_fast_gradients
from dist_pca.model.heads import MULTI_SCALE_HEADS, DeepLabV2Head, Head, MultiScaleHead
from dist_pca.model.parts import freeze
from dist_pca.model.projection import Projection, grid_size, resize
from dist_pca.model.weights import load_weights

if TYPE_CHECKING:
    from dist_pca.config import ModelConfig


class Output(NamedTuple):
    """What a network says about a batch of B images."""

    logits: torch.Tensor
    """Class scores before softmax, B x K x h x w."""
    features: torch.Tensor
    """Pixel features for association, B x C x h' x w', at a stride of their own."""
    deepest: torch.Tensor | None = None
    """The backbone's deepest map, where `Segmenter.gives_deepest` asks for it."""


class Segmenter(nn.Module):
    """Backbone and head. Normalisation of images is inside, so batches travel as uint8.

    Args:
        backbone: Gives feature maps, finest first.
        head: Reads them; gives logits and what its classifier reads.
        association_features: Which pixel features are given out: the deepest map, what the classifier reads, or a
            learned projection of all maps.
        association_stride: Pixels per position of these features; None keeps the map's own stride, and takes that of
            the deepest map for the projection.
        projection_channels: Channels of the projection.
    """

    mean: torch.Tensor
    std: torch.Tensor
    frozen_batch_norm: bool
    """Keep running statistics as they are, in training mode too."""
    projection: Projection | None
    """Gives the features, where association_features is `projection`."""
    gives_deepest: bool
    """Give out the backbone's deepest map too."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        association_features: Literal["backbone", "head", "projection"] = "backbone",
        association_stride: int | None = None,
        projection_channels: int = 256,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.association_features = association_features
        self.association_stride = association_stride
        deepest = backbone.strides[-1]
        self.feature_stride: float = deepest
        if association_features == "head" and isinstance(head, MultiScaleHead):
            self.feature_stride = head.stride
        self.projection = None
        if association_features == "projection":
            self.projection = Projection(
                backbone.channels, backbone.strides, projection_channels, association_stride or deepest
            )
        self.frozen_batch_norm = False
        self.gives_deepest = False
        # Saved with the weights, which mean nothing under another normalisation.
        self.register_buffer("mean", torch.tensor(backbone.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> Output:
        """Segment images B x bands x H x W, uint8 or floating point in 0..1."""
        maps = self.backbone(normalised(images, self.mean, self.std))
        logits, read_by_classifier = self.head(maps)
        deepest = maps[-1] if self.gives_deepest else None
        if self.projection is not None:
            return Output(logits, self.projection(maps), deepest)
        features = maps[-1] if self.association_features == "backbone" else read_by_classifier
        return Output(logits, self._on_association_grid(features), deepest)

    def _on_association_grid(self, features: torch.Tensor) -> torch.Tensor:
        stride, own = self.association_stride, self.feature_stride
        if stride is None or stride == own:
            return features
        return resize(features, grid_size(features, own, stride), coarser=stride > own)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        hold_statistics(self, frozen_only=not self.frozen_batch_norm)
        return self


def normalised(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Shift and scale images B x bands x H x W, uint8 or floating point in 0..1, to what a backbone expects."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    # Convolutions run about 1.3 times as fast on channels-last maps, on CPU and GPU.
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def build_segmenter(config: "ModelConfig", num_classes: int) -> Segmenter:
    """The network that a config describes, ready to train: its backbone's weights loaded and its head drawn at random.

    With `init_from` all of it is drawn at random, until `initialise` sets it.

    Raises:
        UserError: timm has no such backbone, it cannot have the output stride or stochastic depth or checkpoint
            activations, it has no part that is to be frozen, or its weights cannot be had or do not fit.
    """
    segmenter = build_network(config, num_classes, drop_path=config.drop_path)
    backbone = segmenter.backbone
    if config.init_from is None:
        load_weights(backbone.body, config.backbone, config.weights, config.image_size, backbone.options.bands)
    freeze(backbone.body, config.freeze)
    if config.batch_norm == "sync":
        synchronise(backbone)
    segmenter.frozen_batch_norm = config.batch_norm == "frozen"
    use_fast_gradients(segmenter)
    if config.activation_checkpointing:
        checkpoint_activations(backbone, config.backbone)
        track_forward_only(segmenter)
    if config.compile:
        # In place: a wrapper would put its own name before those of all tensors.
        backbone.body.compile()
    return segmenter.train()


def fit_to_crop(config: "ModelConfig", crop: Size) -> "ModelConfig":
    """Set image_size to the crop's, if it is not set and a backbone of a fixed size needs it."""
    fitted = fit_image_size(backbone_options(config), crop)
    return config.model_copy(update={"image_size": fitted.image_size})


def backbone_options(config: "ModelConfig") -> BackboneOptions:
    """What a config's backbone is built from."""
    return BackboneOptions(config.backbone, config.output_stride, config.image_size, config.bands or 3)


def build_network(config: "ModelConfig", num_classes: int, *, drop_path: float = 0.0) -> Segmenter:
    """The network that a config describes, with random weights, to be given others and evaluated.

    Raises:
        UserError: timm has no such backbone, or it cannot have the output stride or stochastic depth.
    """
    backbone = build_backbone(*backbone_options(config), drop_path)
    head: Head
    if config.head == "deeplab_v2":
        head = DeepLabV2Head(backbone.channels[-1], num_classes)
    else:
        multi_scale = MULTI_SCALE_HEADS[config.head]
        head = multi_scale(
            backbone.channels, backbone.strides, config.head_channels, num_classes, stride=config.head_stride
        )
    return Segmenter(
        backbone,
        head,
        association_features=config.association_features,
        association_stride=config.association_stride,
        projection_channels=config.projection_channels,
    )
