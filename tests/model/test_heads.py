from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dist_pca.model.heads import MULTI_SCALE_HEADS, DAFormerHead, DeepLabV2Head, MLPHead, PyramidHead

every_head = pytest.mark.parametrize("name", MULTI_SCALE_HEADS)


def pyramid(strides: tuple[int, ...], channels: tuple[int, ...], height: int, width: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, wide, -(-height // stride), -(-width // stride))
        for stride, wide in zip(strides, channels, strict=True)
    ]


def test_the_deeplab_head_sums_four_dilated_convolutions_of_the_deepest_map() -> None:
    head = DeepLabV2Head(5, 3)
    # Larger than the widest dilation, so that every branch sees more than its middle.
    deepest = torch.randn(1, 5, 25, 27)
    parts = [
        F.conv2d(deepest, branch.get_parameter("weight"), branch.get_parameter("bias"), 1, dilation, dilation)
        for dilation, branch in zip((6, 12, 18, 24), head.branches, strict=True)
    ]
    logits, features = head([torch.randn(1, 4, 50, 54), deepest])
    torch.testing.assert_close(logits, torch.stack(parts).sum(0))
    assert features is deepest


def test_the_deeplab_head_starts_with_small_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    for branch in DeepLabV2Head(256, 19).branches:
        assert branch.get_parameter("weight").std().item() == pytest.approx(0.01, rel=0.02)
        assert not branch.get_parameter("bias").any()


@pytest.mark.parametrize(
    ("strides", "asked", "given"),
    [
        ((2, 4, 8, 16, 32), 4, 4),
        ((2, 4, 8, 16, 32), 8, 8),
        ((2, 4, 8, 8, 8), 4, 4),
        ((2, 4, 8, 8, 8), 16, 8),
        ((4, 8, 16, 32), 32, 32),
        ((8, 16, 32), 4, 8),
        ((16, 16, 16), 4, 4),
        ((16, 16, 16), 8, 8),
        ((16, 16, 16), 16, 16),
        ((16, 16, 16), 32, 16),
        ((14, 14, 14), 4, 3.5),
        ((14, 14, 14), 8, 7),
        ((32, 32), 4, 4),
    ],
)
@every_head
def test_logits_have_the_stride_asked_for_where_the_backbone_allows_it(
    name: str, strides: tuple[int, ...], asked: int, given: float
) -> None:
    channels = tuple(range(4, 4 + len(strides)))
    head = MULTI_SCALE_HEADS[name](channels, strides, 24, 7, stride=asked)
    logits, features = head(pyramid(strides, channels, 224, 448))
    size = (int(224 / given), int(448 / given))
    assert head.stride == given
    assert logits.shape == (2, 7, *size)
    assert features.shape == (2, 24, *size)


@every_head
def test_maps_whose_edges_are_no_multiples_of_each_other_fit_together(name: str) -> None:
    head = MULTI_SCALE_HEADS[name]((4, 5, 6, 7), (4, 8, 16, 32), 8, 3)
    assert head(pyramid((4, 8, 16, 32), (4, 5, 6, 7), 73, 91)).logits.shape == (2, 3, 19, 23)


@pytest.mark.parametrize("strides", [(8, 16), (16, 16)])
@every_head
def test_a_heads_features_are_what_its_classifier_reads(name: str, strides: tuple[int, ...]) -> None:
    head = MULTI_SCALE_HEADS[name]((4, 5), strides, 12, 3)
    logits, features = head(pyramid(strides, (4, 5), 64, 64))
    torch.testing.assert_close(head.classifier(features), logits)
    assert (features >= 0).all()


@pytest.mark.parametrize("stride", [4, 8])
@every_head
def test_a_head_reads_every_map_of_its_stride_or_more_and_no_finer_one(name: str, stride: int) -> None:
    strides, channels = (2, 4, 8, 16, 32), (2, 3, 4, 5, 6)
    head = MULTI_SCALE_HEADS[name](channels, strides, 16, 3, stride=stride)
    maps = [feature_map.requires_grad_() for feature_map in pyramid(strides, channels, 64, 64)]
    head(maps).logits.square().sum().backward()
    for map_stride, feature_map in zip(strides, maps, strict=True):
        assert (feature_map.grad is not None and bool(feature_map.grad.any())) == (map_stride >= stride)


@pytest.mark.parametrize("stride", [4, 16, 32])
@every_head
def test_maps_of_one_stride_are_all_read(name: str, stride: int) -> None:
    head = MULTI_SCALE_HEADS[name]((3, 4, 5), (16, 16, 16), 16, 3, stride=stride)
    maps = [feature_map.requires_grad_() for feature_map in pyramid((16, 16, 16), (3, 4, 5), 64, 64)]
    head(maps).logits.square().sum().backward()
    assert all(feature_map.grad is not None and feature_map.grad.any() for feature_map in maps)


@pytest.mark.parametrize("strides", [(4, 8, 32), (16, 16, 16)])
@every_head
def test_an_image_is_segmented_alike_whatever_its_batch_in_training_too(name: str, strides: tuple[int, ...]) -> None:
    head = MULTI_SCALE_HEADS[name]((3, 4, 5), strides, 16, 3).train()
    maps = pyramid(strides, (3, 4, 5), 64, 96)
    together, alone = head(maps).logits[:1], head([feature_map[:1] for feature_map in maps]).logits
    torch.testing.assert_close(alone, together)


@every_head
def test_every_class_starts_equally_likely(name: str) -> None:
    head = MULTI_SCALE_HEADS[name]((3, 4, 5), (4, 8, 32), 64, 19)
    probabilities = head(pyramid((4, 8, 32), (3, 4, 5), 64, 96)).logits.softmax(1)
    assert (probabilities * 19 - 1).abs().max() < 0.5


def test_the_daformer_heads_dilations_reach_as_many_pixels_at_every_stride() -> None:
    for stride in (4, 8, 16):
        head = DAFormerHead((3, 4, 5), (4, 8, 16), 8, 3, stride=stride)
        convolutions: list[Any] = [branch.get_submodule("0") for branch in head.branches]
        first, *reaches = (layer.dilation[0] * stride for layer in convolutions)
        assert first == stride
        assert reaches == pytest.approx([24, 48, 72], abs=stride / 2)


@pytest.mark.parametrize(("head", "far"), [(DAFormerHead, True), (MLPHead, False), (PyramidHead, False)])
def test_only_dilated_convolutions_look_far_on_the_finest_map(
    head: type[PyramidHead], far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = head((4,), (4,), 8, 3)
    # Group norms mix all positions; without them what is left is what convolutions reach.
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            monkeypatch.setattr(module, "forward", lambda x: x)
    finest = torch.randn(1, 4, 41, 41, requires_grad=True)
    network([finest]).logits[0, :, 20, 20].sum().backward()
    assert finest.grad is not None
    reached = finest.grad[0].abs().sum(0).nonzero() - 20
    assert int(reached.abs().max()) == (18 if far else int(head is PyramidHead))
