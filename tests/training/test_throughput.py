"""Operations of a network are counted once and exactly; the device's peak is a table."""

import pytest
import torch
from torch import nn

from dist_pca.config import load_config
from dist_pca.model.segmenter import Output, build_segmenter
from dist_pca.resources import resource
from dist_pca.training.throughput import network_flops, peak_flops, peak_memory


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, images: torch.Tensor) -> Output:
        logits = self.convolution(images)
        return Output(logits, logits)


def test_a_convolution_counts_two_operations_a_product_forward_and_as_many_backward() -> None:
    forward = 2 * (3 * 3 * 3) * 8 * 10 * 12
    # Images need no gradient, so the way back is that of the weight alone.
    assert network_flops(OneConvolution(), 10, 12) == 2 * forward


@pytest.mark.parametrize("batch_norm", ["local", "sync", "frozen"])
def test_counting_leaves_the_network_as_it_was(batch_norm: str) -> None:
    settings = ["model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null"]
    config = load_config(resource("configs", "demo"), [*settings, f"model.batch_norm={batch_norm}"])
    model = build_segmenter(config.model, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    small, large = network_flops(model, 64, 64), network_flops(model, 128, 128)
    assert 0 < 3.5 * small < large < 4.5 * small
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "half", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_a_devices_peak_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, half: float, fp32: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == half * 1e12
    assert peak_flops(torch.device("cuda"), "fp32") == fp32 * 1e12


def test_a_peak_that_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Accelerator 9")
    assert peak_flops(torch.device("cuda"), "fp32") is None


def test_peak_memory_covers_what_was_held() -> None:
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) > held.nbytes
