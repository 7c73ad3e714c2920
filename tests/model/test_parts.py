"""Parts of a backbone that are not trained."""

import pytest
import torch
from torch import nn

from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter


def build(backbone: str, *parts: str, **keys: object) -> Segmenter:
    values = {"weights": "scratch", "output_stride": None, "head": "pyramid", "head_channels": 8} | keys
    return build_segmenter(ModelConfig.model_validate({"backbone": backbone, "freeze": parts} | values), 3)


def frozen(segmenter: Segmenter) -> set[str]:
    """First words of the names of the backbone's parameters without gradients."""
    names = (name for name, parameter in segmenter.backbone.body.named_parameters() if not parameter.requires_grad)
    return {".".join(name.removeprefix("model.").split(".")[:2]) for name in names}


@pytest.mark.parametrize(
    ("backbone", "parts", "names"),
    [
        ("test_resnet", ("stem",), {"conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1.weight", "bn1.bias"}),
        ("test_resnet", ("layer1", "layer3"), {"layer1.0", "layer3.0"}),
        (
            "test_convnext",
            ("stem", "stages.0"),
            {"stem_0.weight", "stem_0.bias", "stem_1.weight", "stem_1.bias", "stages_0.blocks"},
        ),
        ("test_vit2", ("patch_embed", "blocks.1"), {"patch_embed.proj", "blocks.1"}),
        ("test_vit2", ("stem",), {"reg_token", "pos_embed", "patch_embed.proj"}),
    ],
)
def test_what_is_named_gets_no_gradients(backbone: str, parts: tuple[str, ...], names: set[str]) -> None:
    segmenter = build(backbone, *parts)
    assert frozen(segmenter) == names
    logits, _, _ = segmenter(torch.rand(2, 3, 64, 64))
    logits.square().sum().backward()
    for name, parameter in segmenter.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_a_block_is_not_one_whose_number_begins_alike() -> None:
    segmenter = build("vit_tiny_patch16_224", "blocks.1")
    assert frozen(segmenter) == {"blocks.1"}


def test_the_whole_backbone_can_be_frozen_and_the_head_trains() -> None:
    segmenter = build("test_resnet", "backbone")
    assert {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad} == {
        name for name, _ in segmenter.named_parameters() if name.startswith("head.")
    }


def test_batch_norms_of_frozen_parts_keep_their_statistics_and_others_do_not() -> None:
    segmenter = build("test_resnet", "stem", "layer2").train()
    norms = {
        name: layer for name, layer in segmenter.backbone.body.named_modules() if isinstance(layer, nn.BatchNorm2d)
    }
    before = {name: layer.running_mean.clone() for name, layer in norms.items() if layer.running_mean is not None}
    segmenter.eval().train()(torch.rand(2, 3, 64, 64))
    changed = {name for name, layer in norms.items() if not torch.equal(before[name], layer.running_mean)}  # type: ignore[arg-type]
    assert changed == {name for name in norms if name.startswith(("layer1", "layer3", "layer4"))}


@pytest.mark.parametrize(
    ("part", "nearest"), [("layer5", "layer4"), ("backbones", "backbone"), ("stage", "stem"), ("layer", "layer4")]
)
def test_an_unknown_part_is_refused_with_the_nearest(part: str, nearest: str) -> None:
    with pytest.raises(
        UserError, match=rf"^model\.freeze: test_resnet has no part '{part}'; the nearest is {nearest}$"
    ):
        build("test_resnet", part)
