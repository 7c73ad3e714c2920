"""Synchronised batch norm through torch's fused kernels, on ranks that share one GPU, against plain fp64 on a CPU."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_pca.model.batch_norm import SynchronisedBatchNorm, synchronise
from tests.gpu.devices import DEVICES, one_rank
from tests.support.ranks import run_on_ranks

SHARES = (3, 2)
SHAPE = (5, 6, 7, 9)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2, "fp16": 5e-3}


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose mean differs between ranks, and the output's gradient, both rounded to a type."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SHAPE, generator=generator) + torch.arange(5.0)[:, None, None, None]
    images[:, -1] = 0.25  # A channel with one value everywhere, as behind a ReLU.
    return images.to(dtype), torch.randn(SHAPE, generator=generator).to(dtype)


def layer() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(SHAPE[1], momentum=0.3)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 2, SHAPE[1]))
        made.bias.copy_(torch.linspace(-1, 1, SHAPE[1]))
    return made


def step(network: nn.Module, images: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    images = images.detach().requires_grad_()
    output = network(images)
    output.backward(gradient)
    assert images.grad is not None
    found = {"output": output.detach(), "input gradient": images.grad}
    found |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: value.double().cpu() for name, value in (found | dict(network.named_buffers())).items()}


def on_rank(rank: int, ranks: int, device: str) -> dict[str, dict[str, torch.Tensor]]:
    """Results of each type and layout, through gloo, which lets ranks share a GPU."""
    found = {}
    for name, dtype in TYPES.items():
        for layout, memory_format in LAYOUTS.items():
            network = nn.Sequential(layer())
            synchronise(network)
            images, gradient = (
                part.split(SHARES)[rank].to(device).contiguous(memory_format=memory_format) for part in batch(dtype)
            )
            found[f"{name}, {layout}"] = step(network.to(device), images, gradient)
    return found


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_two_ranks_equal_one_process_in_every_type_and_layout(device: str, tmp_path: Path) -> None:
    ranks = run_on_ranks(on_rank, 2, tmp_path, device)
    for case, (one, two) in {case: [rank[case] for rank in ranks] for case in ranks[0]}.items():
        name = case.partition(",")[0]
        expected = step(nn.Sequential(layer()).double(), *(part.double() for part in batch(TYPES[name])))
        tolerance = TOLERANCE[name]
        for key in ("output", "input gradient"):
            torch.testing.assert_close(torch.cat([one[key], two[key]]), expected[key], rtol=tolerance, atol=tolerance)
        for key in ("0.weight", "0.bias"):
            torch.testing.assert_close(one[key] + two[key], expected[key], rtol=tolerance, atol=20 * tolerance)
        for key in ("0.running_mean", "0.running_var"):
            torch.testing.assert_close(one[key], expected[key], rtol=1e-4, atol=1e-5)
            assert torch.equal(one[key], two[key])


@pytest.mark.parametrize("device", DEVICES)
def test_with_one_rank_it_is_plain_batch_norm_and_on_a_gpu_torchs_own(device: str) -> None:
    images, gradient = (part.to(device) for part in batch(torch.float32))
    with one_rank(device):
        ours = step(SynchronisedBatchNorm(layer()).to(device), images, gradient)
        plain = copy.deepcopy(layer()).to(device)
        theirs = step(nn.SyncBatchNorm.convert_sync_batchnorm(plain) if device == "cuda" else plain, images, gradient)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
