import pytest
import torch
from torch.nn import functional as F

from dist_pca.model.heads import DeepLabV2Head, PyramidHead


def pyramid(strides: tuple[int, ...], channels: tuple[int, ...], height: int, width: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, wide, -(-height // stride), -(-width // stride))
        for stride, wide in zip(strides, channels, strict=True)
    ]


def test_the_deeplab_head_sums_four_dilated_convolutions_of_the_deepest_map() -> None:
    head = DeepLabV2Head(5, 3)
    deepest = torch.randn(2, 5, 11, 13)
    parts = [
        F.conv2d(deepest, branch.weight, branch.bias, padding=dilation, dilation=dilation)
        for dilation, branch in zip((6, 12, 18, 24), head.branches, strict=True)
    ]
    logits, features = head([torch.randn(2, 4, 22, 26), deepest])
    torch.testing.assert_close(logits, torch.stack(parts).sum(0))
    assert features is deepest


def test_the_deeplab_head_starts_with_small_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    for branch in DeepLabV2Head(256, 19).branches:
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not branch.bias.any()


@pytest.mark.parametrize(
    ("strides", "logit_stride"),
    [((2, 4, 8, 16, 32), 8), ((2, 4, 8, 8, 8), 8), ((4, 8, 16, 32), 8), ((16, 16, 16), 16), ((2, 4, 4, 4), 4)],
)
def test_the_pyramid_gives_logits_at_the_finest_stride_of_eight_or_more(
    strides: tuple[int, ...], logit_stride: int
) -> None:
    channels = tuple(range(4, 4 + len(strides)))
    head = PyramidHead(channels, strides, 24, 7)
    logits, features = head(pyramid(strides, channels, 73, 91))
    size = (-(-73 // logit_stride), -(-91 // logit_stride))
    assert logits.shape == (2, 7, *size)
    assert features.shape == (2, 24, *size)


def test_the_pyramids_features_are_what_its_classifier_reads() -> None:
    head = PyramidHead((4, 5), (8, 16), 12, 3)
    logits, features = head(pyramid((8, 16), (4, 5), 64, 64))
    torch.testing.assert_close(head.classifier(features), logits)
    assert (features >= 0).all()


def test_the_pyramid_listens_to_every_stride_of_eight_or_more_and_to_no_finer_one() -> None:
    strides, channels = (4, 8, 16, 32), (3, 4, 5, 6)
    head = PyramidHead(channels, strides, 16, 3)
    maps = [feature_map.requires_grad_() for feature_map in pyramid(strides, channels, 64, 64)]
    head(maps).logits.square().sum().backward()
    assert maps[0].grad is None
    assert all(feature_map.grad is not None and feature_map.grad.any() for feature_map in maps[1:])
