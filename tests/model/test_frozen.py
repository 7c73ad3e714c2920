"""The frozen backbone is the one that a run began with, whatever becomes of the one that trains."""

import pytest
import torch

from dist_pca.config import ModelConfig
from dist_pca.model.frozen import FrozenBackbone
from dist_pca.model.segmenter import Segmenter, build_segmenter


def build(**options: object) -> Segmenter:
    torch.manual_seed(0)
    values = {"weights": "scratch", "output_stride": None, "head": "pyramid", "head_channels": 16} | options
    return build_segmenter(ModelConfig.model_validate(values), 5)


@pytest.mark.parametrize("options", [{}, {"batch_norm": "sync"}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_it_gives_the_deepest_map_of_the_weights_it_was_copied_from(backbone: str, options: dict[str, object]) -> None:
    segmenter = build(backbone=backbone, **options)
    segmenter.gives_deepest = True
    frozen = FrozenBackbone(segmenter)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    expected = segmenter.eval()(images).deepest
    assert expected is not None
    segmenter.train()
    optimizer = torch.optim.SGD(segmenter.parameters(), lr=0.1)
    output = segmenter(images)
    assert output.deepest is not None
    (output.logits.square().mean() + output.deepest.square().mean()).backward()
    optimizer.step()
    found = frozen(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found.requires_grad
    moved = segmenter.eval()(images).deepest
    assert moved is not None
    assert (moved - expected).abs().max() > 1e-4
    torch.testing.assert_close(frozen(images.float() / 255), found)


def test_it_is_not_part_of_what_trains() -> None:
    segmenter = build(backbone="test_resnet")
    frozen = FrozenBackbone(segmenter)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    own = {parameter.data_ptr() for parameter in segmenter.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in frozen.parameters())
    assert sum(p.numel() for p in frozen.parameters()) == sum(p.numel() for p in segmenter.backbone.parameters())


def test_the_deepest_map_is_given_where_it_is_asked_for() -> None:
    segmenter = build(backbone="test_resnet", association_features="projection")
    images = torch.zeros(1, 3, 64, 96)
    assert segmenter(images).deepest is None
    segmenter.gives_deepest = True
    deepest = segmenter(images).deepest
    assert deepest is not None
    assert deepest.shape[1] == segmenter.backbone.channels[-1]


def test_it_computes_in_the_runs_precision() -> None:
    segmenter = build(backbone="test_resnet")
    found = FrozenBackbone(segmenter, autocast=torch.bfloat16)(torch.zeros(1, 3, 64, 96))
    assert found.dtype == torch.bfloat16
