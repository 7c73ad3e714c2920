"""All terms of the objective, and the masks of views, on a device, against the same on the CPU."""

from typing import Any

import pytest
import torch

from dist_pca.config import load_config
from dist_pca.data.views import block_mask, class_mask
from dist_pca.objective import Domain, objective
from dist_pca.objective.class_statistics import ClassStatistics
from dist_pca.resources import resource
from tests.gpu.devices import DEVICES

CLASSES, IMAGES, SIZE, LOGITS, GRID, CHANNELS = 5, 2, (32, 48), (8, 12), (4, 6), 6
SETTINGS = (
    *("dice.weight=0.5", "lovasz.weight=0.75", "smoothness.weight=0.01", "source_contrast.weight=0.1"),
    *("class_statistics.weight=0.1", "self_training.weight=1", "self_training.threshold=0.3"),
    *("masked_consistency.weight=1", "feature_distance.weight=0.1", "feature_distance.share=0.5"),
    *("association.start_step=0", "association.ramp_steps=0", "association.label_share=0.5"),
    *("association.teacher_check=true", "association.teacher_weight=true", "association.teacher_matches=true"),
)


def view(seed: int, device: str, **more: torch.Tensor) -> Domain:
    """A domain of random outputs, whose labels are blocks of pixels."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(channels: int, *size: int) -> torch.Tensor:
        return torch.randn(IMAGES, channels, *size, generator=generator).to(device)

    labels = torch.randint(0, CLASSES + 1, (IMAGES, *GRID), generator=generator)
    labels[labels == CLASSES] = 255
    return Domain(
        drawn(CLASSES, *LOGITS).requires_grad_(),
        drawn(CHANNELS, *GRID).requires_grad_(),
        labels.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).to(device),
        seeds=[seed, seed + 1],
        teacher_logits=drawn(CLASSES, *LOGITS),
        teacher_features=drawn(CHANNELS, *GRID),
        **more,
    )


def value_and_gradients(device: str, *overrides: str) -> dict[str, torch.Tensor]:
    config = load_config(resource("configs", "demo"), [f"objective.{key}" for key in (*SETTINGS, *overrides)]).objective
    generator = torch.Generator().manual_seed(9)
    deepest, pretrained = (torch.randn(IMAGES, 3, *GRID, generator=generator).to(device) for _ in range(2))
    confident = (torch.rand(IMAGES, *SIZE, generator=generator) < 0.5).to(device)
    domains = (
        view(1, device, deepest=deepest.requires_grad_(), pretrained=pretrained),
        view(2, device),
        view(3, device, confident=confident, trusted=confident.flip(1)),
        view(4, device, confident=confident),
    )
    options: dict[str, Any] = {"things": (1, 3), "statistics": ClassStatistics(), "class_weights": (1, 2, 0.5, 1, 0)}
    loss, terms = objective(config, *domains, step=10, **options)
    inputs = [x for domain in domains for x in (domain.logits, domain.features)]
    gradients = torch.autograd.grad(loss, [*inputs, deepest], allow_unused=True)
    found = terms | {f"gradient {place}": x for place, x in enumerate(gradients) if x is not None}
    return {name: value.detach().double().cpu() for name, value in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "overrides", [("lovasz.bins=null",), ("lovasz.bins=64", "association.pixel_budget=11"), ("association.scope=pair",)]
)
def test_every_term_and_its_gradient_are_those_of_the_cpu(overrides: tuple[str, ...], device: str) -> None:
    expected, found = (value_and_gradients(name, *overrides) for name in ("cpu", device))
    assert len(expected) > 25
    assert expected["kept_features"] > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, equal_nan=True, msg=name)


def images_and_labels(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(3 * 8 * 8).view(3, 8, 8).div(24, rounding_mode="floor")
    return torch.zeros(3, 3, 8, 8, device=device), labels.to(device, torch.uint8)


def masks(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    indices = [4, 5, 6]
    return [class_mask(labels, indices, seed=1), block_mask(images, indices, seed=1, block=2, ratio=0.5)]


@pytest.mark.parametrize("device", DEVICES)
def test_masks_are_those_of_the_cpu(device: str) -> None:
    for mask, expected in zip(masks(*images_and_labels(device)), masks(*images_and_labels("cpu")), strict=True):
        assert torch.equal(mask.cpu(), expected)
        assert expected.any()
        assert not expected.all()


@pytest.mark.gpu
def test_the_host_waits_for_no_mask() -> None:
    inputs = images_and_labels("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
