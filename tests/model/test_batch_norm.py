import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dist_pca.config import ModelConfig
from dist_pca.model.batch_norm import average_over_ranks, kept_statistics, running_statistics, synchronise
from dist_pca.model.segmenter import build_segmenter
from tests.support.ranks import run_on_ranks

SHARES = (3, 2)
"""Images of each rank: ranks need not hold equally many."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        BatchNormAct2d(4, act_layer=nn.SiLU),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, momentum=0.3),
        nn.Tanh(),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose mean is far from zero, and the gradient that the output gets."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(SHARES), 3, 9, 8, generator=generator) + 30
    return images, torch.randn(sum(SHARES), 5, 5, 4, generator=generator)


def normalise(
    rank: int | None, shares: tuple[int, ...], offset: float, dtype: torch.dtype, affine: bool
) -> dict[str, torch.Tensor]:
    """One layer's output, gradients and statistics on a rank's share of images; without a rank, in fp64 on all."""
    layer = nn.Sequential(nn.BatchNorm2d(3, affine=affine))
    generator = torch.Generator().manual_seed(2)
    # Ranks' means differ by as much as values do.
    images = torch.randn(5, 3, 4, 3, generator=generator) + torch.arange(5)[:, None, None, None] + offset
    gradient = torch.randn(5, 3, 4, 3, generator=generator)
    if rank is not None:
        synchronise(layer)
        images, gradient = (values.split(shares)[rank] for values in (images, gradient))
    images, gradient = images.to(dtype), gradient.to(dtype)
    if rank is None:
        layer, images, gradient = layer.double(), images.double(), gradient.double()
    result = step(layer, images, gradient)
    found: dict[str, torch.Tensor] = {name: result[name] for name in ("output", "input_gradient")}
    found |= result["gradients"] | result["statistics"]
    return found


CASES = {
    "a rank without images": ((5, 0), 0.0, torch.float32, True),
    "a mean of 10,000 standard deviations": ((3, 2), 1e4, torch.float32, True),
    "bf16": ((3, 2), 0.0, torch.bfloat16, True),
    "a layer without scale and shift": ((3, 2), 0.0, torch.float32, False),
}


def step(net: nn.Module, images: torch.Tensor, gradient: torch.Tensor) -> dict[str, Any]:
    images = images.clone().requires_grad_()
    output = net(images)
    output.backward(gradient)
    return {
        "output": output.detach(),
        "input_gradient": images.grad,
        "gradients": {name: parameter.grad for name, parameter in net.named_parameters()},
        "statistics": dict(net.named_buffers()),
    }


def step_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    net = network()
    images, gradient = (values.split(SHARES)[rank] for values in batch())
    alone = copy.deepcopy(net)
    step(alone, images, gradient)
    before = copy.deepcopy(dict(alone.named_buffers()))
    average_over_ranks(running_statistics(alone).values())
    synchronise(net)
    result = step(net, images, gradient)
    net.eval()
    return result | {
        "evaluation_output": net(images).detach(),
        "kept_apart": before,
        "averaged": dict(alone.named_buffers()),
        "cases": {name: normalise(rank, *case) for name, case in CASES.items()},
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(step_on_rank, len(SHARES), folder)


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    net = network()
    result = step(net, *batch())
    net.eval()
    return result | {"evaluation_output": net(batch()[0]).detach()}


@pytest.mark.parametrize("key", ["output", "input_gradient", "evaluation_output"])
def test_synchronised_ranks_equal_one_process_on_the_whole_batch(
    key: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), single[key], rtol=1e-4, atol=2e-5)


def test_gradients_summed_over_synchronised_ranks_equal_one_process(
    ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for name, gradient in single["gradients"].items():
        total = sum(rank["gradients"][name] for rank in ranks)
        # The images' mean of 30 cancels in the first convolution's gradient, which fp32 alone rounds at 1e-5 of its
        # largest element; those of biases that are normalised away are zero but for rounding.
        atol = max(1e-4 * float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=atol, msg=partial("{}: {}".format, name))


def test_every_synchronised_rank_has_the_running_statistics_of_one_process(
    ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["statistics"], single["statistics"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_synchronised_ranks_equal_one_process_in(name: str, ranks: list[dict[str, Any]]) -> None:
    shares, offset, dtype, affine = CASES[name]
    # Inputs of fp32 are 1e-3 apart at 10,000, and those of bf16 1e-2 at 1.
    tolerance = {torch.float32: 2e-3 if offset else 1e-5, torch.bfloat16: 4e-2}[dtype]
    expected = normalise(None, shares, offset, dtype, affine)
    found = [rank["cases"][name] for rank in ranks]
    for key in ("output", "input_gradient"):
        ours = torch.cat([values[key] for values in found])
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected[key], rtol=tolerance, atol=tolerance)
    for key in ("0.weight", "0.bias") if affine else ():
        ours = sum(values[key] for values in found)
        torch.testing.assert_close(ours.double(), expected[key], rtol=tolerance, atol=10 * tolerance)
    for values in found:
        for key in ("0.running_mean", "0.running_var"):
            torch.testing.assert_close(values[key].double(), expected[key], rtol=2e-4, atol=1e-5)


def test_averaging_gives_every_rank_the_mean_of_what_ranks_kept_apart(ranks: list[dict[str, Any]]) -> None:
    for name in ("1.running_mean", "1.running_var", "3.running_mean", "3.running_var"):
        apart = [rank["kept_apart"][name] for rank in ranks]
        assert not torch.equal(apart[0], apart[1])
        for rank in ranks:
            torch.testing.assert_close(rank["averaged"][name], (apart[0] + apart[1]) / 2)


def average_what_is_shared(rank: int, world_size: int) -> torch.Tensor:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    average_over_ranks([values])
    return values


@pytest.mark.slow
def test_averaging_keeps_every_bit_of_what_three_ranks_have_in_common(tmp_path: Path) -> None:
    # In fp32, a sixth of these values would differ in their last bit from a third of their threefold.
    before = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for values in run_on_ranks(average_what_is_shared, 3, tmp_path):
        assert torch.equal(values, before)


def variance_of_one_pixel(rank: int, world_size: int) -> torch.Tensor:
    layer = nn.Sequential(nn.BatchNorm2d(2, momentum=0.25))
    synchronise(layer)
    layer(torch.full((1 - rank, 2, 1, 1), 3.0))
    return layer.get_buffer("0.running_var")


def test_one_pixel_on_all_ranks_has_no_variance_and_leaves_the_running_one_finite(tmp_path: Path) -> None:
    for found in run_on_ranks(variance_of_one_pixel, 2, tmp_path):
        assert found.tolist() == [0.75, 0.75]


def test_averaging_in_a_single_process_changes_nothing() -> None:
    net = network()
    step(net, *batch())
    before = copy.deepcopy(net.state_dict())
    average_over_ranks(running_statistics(net).values())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_synchronising_keeps_the_names_of_a_networks_tensors_and_its_output_in_a_single_process() -> None:
    plain, synchronised = network(), network()
    synchronise(synchronised)
    assert list(synchronised.state_dict()) == list(plain.state_dict())
    images, _ = batch()
    torch.testing.assert_close(synchronised(images), plain(images))


def test_frozen_statistics_stay_in_training_while_scale_and_shift_train() -> None:
    config = ModelConfig(backbone="test_resnet", weights="scratch", batch_norm="frozen")
    segmenter = build_segmenter(config, 4)
    nn.Sequential(segmenter).train()
    before = copy.deepcopy(dict(segmenter.named_buffers()))
    segmenter(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)).logits.square().sum().backward()
    torch.testing.assert_close(dict(segmenter.named_buffers()), before, rtol=0, atol=0)
    stem = segmenter.get_submodule("backbone.body.bn1")
    for gradient in (stem.get_parameter("weight").grad, stem.get_parameter("bias").grad):
        assert gradient is not None
        assert gradient.any()


def test_local_statistics_move_in_training() -> None:
    segmenter = build_segmenter(ModelConfig(backbone="test_resnet", weights="scratch", batch_norm="local"), 4)
    before = segmenter.get_buffer("backbone.body.bn1.running_mean").clone()
    segmenter(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert not torch.equal(segmenter.get_buffer("backbone.body.bn1.running_mean"), before)


@pytest.mark.parametrize("shared", [False, True])
def test_kept_statistics_stay_while_batches_normalise_themselves(shared: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    if shared:
        synchronise(network)
    x = 5 + torch.randn(6, 3, 4, 4)
    before = {name: value.clone() for name, value in running_statistics(network).items()}
    with kept_statistics(network):
        kept = network(x)
    assert all(torch.equal(value, before[name]) for name, value in running_statistics(network).items())
    assert torch.equal(network(x), kept)
    assert all(not torch.equal(value, before[name]) for name, value in running_statistics(network).items())
