"""What saves memory or time changes neither gradients, nor statistics, nor the names of tensors."""

from typing import Any

import pytest
import torch

from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter


def build(name: str, **options: object) -> Segmenter:
    torch.manual_seed(0)
    values = {"weights": "scratch", "output_stride": None, "head": "pyramid", "head_channels": 16} | options
    return build_segmenter(ModelConfig.model_validate({"backbone": name} | values), 5)


def steps(segmenter: Segmenter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients, and buffers after two batches."""
    for seed in (0, 1):
        images = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        torch.manual_seed(seed)
        logits, features, _ = segmenter(images)
        (logits.square().mean() + features.square().mean()).backward()
    gradients = {name: parameter.grad for name, parameter in segmenter.named_parameters()}
    return gradients, dict(segmenter.named_buffers())


@pytest.mark.parametrize("batch_norm", ["local", "sync", "frozen"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_checkpointed_activations_give_the_same_gradients_and_statistics(name: str, batch_norm: str) -> None:
    plain = steps(build(name, batch_norm=batch_norm))
    checkpointed = steps(build(name, batch_norm=batch_norm, activation_checkpointing=True))
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_checkpointing_computes_activations_anew(name: str) -> None:
    counts = []
    for on in (False, True):
        segmenter = build(name, activation_checkpointing=on)
        calls: list[str] = []
        for module in segmenter.backbone.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_: calls.append(""))  # noqa: B023
        steps(segmenter)
        counts.append(len(calls))
    assert counts[1] > counts[0]


def test_a_family_that_cannot_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr("timm.models.FeatureDictNet.set_grad_checkpointing", refuse)
    with pytest.raises(UserError, match=r"model\.activation_checkpointing: timm cannot checkpoint test_resnet"):
        build("test_resnet", activation_checkpointing=True)


def test_the_backbone_alone_is_compiled_and_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    build("test_resnet")
    assert compiled == []
    segmenter = build("test_resnet", compile=True)
    assert compiled == [segmenter.backbone.body]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"batch_norm": "frozen"}])
def test_a_compiled_backbone_has_the_same_gradients_statistics_and_names(options: dict[str, object]) -> None:
    plain, compiled = build("test_resnet", **options), build("test_resnet", compile=True, **options)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(steps(compiled), steps(plain), rtol=1e-3, atol=1e-5)
