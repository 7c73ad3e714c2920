import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_pca.model.depthwise import DepthwiseConv2d, use_fast_gradients


def convolution(
    kernel: tuple[int, int], dilation: tuple[int, int], *, channels: int = 6, bias: bool = False
) -> nn.Conv2d:
    padding = tuple(rate * (size // 2) for size, rate in zip(kernel, dilation, strict=True))
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=bias)  # type: ignore[arg-type]


def step(layer: nn.Module, images: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor | None]:
    images = images.clone().requires_grad_()
    output = layer(images)
    output.backward(gradient)
    return {
        "output": output.detach(),
        "images": images.grad,
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
    }


@settings(deadline=None)
@given(
    kernel=st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([3, 5, 7])),
    dilation=st.tuples(st.integers(1, 3), st.integers(2, 4)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 12)),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_output_and_gradients_are_those_of_the_plain_convolution(
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    bias: bool,
    channels_last: bool,
) -> None:
    torch.manual_seed(0)
    plain = convolution(kernel, dilation, bias=bias)
    images, gradient = torch.randn(2, batch, 6, *size)
    expected = step(copy.deepcopy(plain).double(), images.double(), gradient.double())
    layers = nn.Sequential(plain)
    use_fast_gradients(layers)
    assert type(layers[0]) is DepthwiseConv2d
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = step(layers[0], images.contiguous(memory_format=layout), gradient.contiguous(memory_format=layout))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert values is not None
        torch.testing.assert_close(found[name], values.float(), rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_only_gradients_that_are_needed_are_computed(images: bool, weight: bool) -> None:
    layer = nn.Sequential(convolution((5, 5), (1, 1)))
    use_fast_gradients(layer)
    layer.requires_grad_(weight)
    given = torch.randn(2, 6, 7, 8, requires_grad=images)
    output = layer(given)
    assert output.requires_grad == (images or weight)
    if output.requires_grad:
        output.sum().backward()
    assert (given.grad is not None) == images
    assert (layer[0].weight.grad is not None) == weight


def test_layers_that_gain_nothing_or_are_of_another_kind_stay_as_they_are() -> None:
    layers = nn.Sequential(
        convolution((3, 3), (1, 1)),
        nn.Conv2d(6, 6, 5, padding=2),
        nn.Conv2d(6, 12, 5, padding=2, groups=6),
        nn.Conv2d(6, 6, 5, padding=2, stride=2, groups=6),
        nn.Conv2d(6, 6, 5, padding=1, groups=6),
        nn.Conv2d(6, 6, 5, padding="same", groups=6),
        nn.Conv2d(6, 6, 5, padding=2, groups=6, padding_mode="reflect"),
    )
    use_fast_gradients(layers)
    assert {type(layer) for layer in layers} == {nn.Conv2d}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_convolved_as_they_were(dtype: torch.dtype) -> None:
    plain = convolution((5, 5), (2, 2)).to(dtype)
    layers = nn.Sequential(copy.deepcopy(plain))
    use_fast_gradients(layers)
    images, gradient = torch.randn(2, 2, 6, 7, 8, dtype=dtype)
    found, expected = step(layers[0], images, gradient), step(plain, images, gradient)
    for name, values in expected.items():
        assert torch.equal(found[name], values)  # type: ignore[arg-type]


def test_inputs_in_fp32_are_convolved_as_they_were_under_autocast() -> None:
    plain = convolution((5, 5), (2, 2), bias=True)
    layers = nn.Sequential(copy.deepcopy(plain))
    use_fast_gradients(layers)
    images = torch.randn(2, 6, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layers(images), plain(images)
    for output in outputs:
        output.float().square().sum().backward()
    assert torch.equal(*outputs)
    for found, expected in zip(layers.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)  # type: ignore[arg-type]


def test_an_empty_batch_has_empty_outputs_and_gradients_of_zero() -> None:
    layers = nn.Sequential(convolution((5, 5), (2, 2)))
    use_fast_gradients(layers)
    found = step(layers, torch.empty(0, 6, 7, 8), torch.empty(0, 6, 7, 8))
    assert found["output"].shape == (0, 6, 7, 8)  # type: ignore[union-attr]
    assert not found["0.weight"].any()  # type: ignore[union-attr]
