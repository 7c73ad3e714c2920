"""The whole association on a device, against its definition in fp64 on the CPU."""

from typing import Any

import pytest
import torch

from dist_pca.association import cycle_association
from tests.association.pixels import CLASSES, labels_of
from tests.gpu.devices import DEVICES

SIZES = (257, 193)
IMPLEMENTATIONS = [
    pytest.param("cpu", "blockwise"),
    pytest.param("cuda", "blockwise", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]


def clustered(channels: int, similarity: str) -> list[torch.Tensor]:
    """Pixels of both domains around common centres, so that cycles are kept."""
    generator = torch.Generator().manual_seed(channels)
    centres = torch.randn(CLASSES, channels, generator=generator, dtype=torch.float64)
    found = []
    for seed, n in enumerate(SIZES):
        labels = labels_of(n, seed).clamp(max=CLASSES - 1)
        found.append(centres[labels] + torch.randn(n, channels, generator=generator, dtype=torch.float64))
    return [x.softmax(dim=1) for x in found] if similarity == "kl" else found


def value_and_gradients(domains: list[torch.Tensor], device: str, **options: Any) -> list[torch.Tensor]:
    source, target = (x.detach().clone().to(device).requires_grad_() for x in domains)
    labels = labels_of(SIZES[0], 0).to(device)
    found = cycle_association(source, target, labels, num_classes=CLASSES, detach_statistics=False, **options)
    assert int(found.kept) > SIZES[0] // 10
    found.loss.backward()
    assert source.grad is not None
    assert target.grad is not None
    return [part.detach().cpu().double() for part in (found.loss, source.grad, target.grad)]


@pytest.mark.parametrize(("device", "implementation"), IMPLEMENTATIONS)
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("channels", [11, 256, 2048])
def test_loss_and_gradients_are_those_of_the_definition(
    channels: int, similarity: str, device: str, implementation: str
) -> None:
    domains = clustered(channels, similarity)
    options: dict[str, Any] = {"similarity": similarity}
    expected = value_and_gradients(domains, "cpu", implementation="reference", **options)
    in_fp32 = [x.float() for x in domains]
    loss, *gradients = value_and_gradients(in_fp32, device, implementation=implementation, **options)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    for gradient, exact in zip(gradients, expected[1:], strict=True):
        # A match that rounding moves changes few rows; none should be moved on these data.
        assert float((gradient - exact).norm() / exact.norm()) < 1e-3
    in_bf16 = value_and_gradients(in_fp32, device, implementation=implementation, dtype="bf16", **options)
    torch.testing.assert_close(in_bf16[0], expected[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize(("device", "implementation"), IMPLEMENTATIONS)
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_without_a_labelled_pixel_the_loss_and_its_gradients_are_zero(
    similarity: str, device: str, implementation: str
) -> None:
    source, target = (x.float().to(device).requires_grad_() for x in clustered(16, similarity))
    labels = torch.full((SIZES[0],), 255, device=device)
    options: dict[str, Any] = {"similarity": similarity, "implementation": implementation}
    found = cycle_association(source, target, labels, num_classes=CLASSES, **options)
    found.loss.backward()
    assert found.loss == found.kept == 0
    for x in (source, target):
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_auto_takes_the_kernels_where_they_run_and_gives_the_same_loss(device: str) -> None:
    domains = [x.float() for x in clustered(64, "cosine")]
    auto, expected = (value_and_gradients(domains, device, implementation=name) for name in ("auto", "reference"))
    torch.testing.assert_close(auto[0], expected[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("device", "implementation"), IMPLEMENTATIONS)
def test_deterministic_mode_gives_the_same_bits_twice(device: str, implementation: str) -> None:
    domains = [x.float() for x in clustered(256, "cosine")]
    options: dict[str, Any] = {"implementation": implementation, "deterministic": True}
    first, second = (value_and_gradients(domains, device, **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
