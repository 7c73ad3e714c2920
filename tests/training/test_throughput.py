"""Operations of a network are counted once and exactly; the device's peak is a table."""

import pytest
import torch
from torch import nn

from dist_pca.config import load_config
from dist_pca.model.segmenter import Output, build_segmenter
from dist_pca.resources import resource
from dist_pca.training.throughput import network_flops, network_passes, peak_flops, peak_memory


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


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_what_checkpointing_computes_anew_does_not_count(backbone: str) -> None:
    counts = []
    for checkpointing in (False, True):
        settings = ["model.weights=scratch", "model.output_stride=null", f"model.backbone={backbone}"]
        config = load_config(
            resource("configs", "demo"), [*settings, f"model.activation_checkpointing={checkpointing}"]
        )
        model = build_segmenter(config.model, 5)
        counts.append(network_flops(model, 64, 64))
        on = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
        assert bool(on) is checkpointing
    assert counts[0] == counts[1] > 0


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


TEACHER = ("training.ema_decay=0.9", "objective.self_training.weight=1")


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (("objective.adapt=false",), 6),
        (("objective.smoothness.weight=0.01",), 6 + 6),
        # The source, the target as it is and mixed, and the teacher's forward pass.
        ((*TEACHER, "objective.association.weight=0.1"), 6 + 2 * 6 + 6 / 3),
        (
            (*TEACHER, "objective.association.weight=0", "objective.smoothness.weight=0"),
            6 + 6 + 6 / 3,
        ),
        (
            (*TEACHER, "objective.association.weight=0.1", "objective.masked_consistency.weight=1"),
            6 + 3 * 6 + 6 / 3,
        ),
    ],
)
def test_every_view_and_a_third_of_what_the_teacher_sees_pass_the_network(
    overrides: tuple[str, ...], passes: float
) -> None:
    config = load_config(
        resource("configs", "gta5_to_cityscapes_paper"),
        [
            *("training.source_batch=6", "training.target_batch=6", "objective.masked_consistency.weight=0"),
            "model.running_statistics=all",
            *("objective.association.teacher_matches=false", "objective.self_training.weight=0"),
            *overrides,
        ],
    )
    assert network_passes(config) == pytest.approx(passes)
