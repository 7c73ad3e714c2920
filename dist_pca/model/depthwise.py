"""Depthwise convolutions whose gradients are fast on the CPU too."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution at stride 1 that keeps an image's size, without padding other than by zeros.

    For gradients of depthwise convolutions on the CPU, oneDNN has fast kernels at 3 x 3 without dilation alone. Both
    gradients are depthwise convolutions themselves, and its forward kernels, which compute them here, are fast at any
    kernel size and dilation. On other devices and in other precisions nothing changes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve B x C x h x w."""
        # Under autocast the output, and so its gradient, would have a lower precision than the saved input and weight.
        plain = input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if plain or input.numel() == 0:
            return super().forward(input)
        output: torch.Tensor = _Depthwise.apply(input, self.weight, self.padding, self.dilation)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


class _Depthwise(torch.autograd.Function):
    """y[p] = sum over i of weight[i] x[p + dilation i - padding], for each image and channel."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int], dilation: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.dilation = padding, dilation
        return F.conv2d(x, weight, None, 1, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,) = gradients
        batch, channels, height, width = x.shape
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # dx[p] = sum over i of weight[i] dy[p + padding - dilation i]: the kernel is turned by 180 degrees.
            dx = F.conv2d(dy, weight.flip(2, 3), None, 1, ctx.padding, ctx.dilation, channels)
        if ctx.needs_input_grad[1]:
            # dweight[i] = sum over p of dy[p] x[p + dilation i - padding]: dy is the kernel, at a stride of the
            # dilation. Each image has its own, so images become channels.
            planes = x.reshape(1, batch * channels, height, width)
            kernels = dy.reshape(batch * channels, 1, height, width)
            products = F.conv2d(planes, kernels, None, ctx.dilation, ctx.padding, 1, batch * channels)
            dweight = products.view(batch, *weight.shape).sum(0)
        return dx, dweight, None, None


def use_fast_gradients(module: nn.Module) -> None:
    """Make every depthwise convolution inside a module a `DepthwiseConv2d` where that is exact and faster.

    Parameters keep their names. Kernels of 3 x 3 without dilation stay as they are.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _gains(layer):
            layer.__class__ = DepthwiseConv2d


def _gains(layer: nn.Conv2d) -> bool:
    spans = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.stride == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.padding == tuple(span / 2 for span in spans)
        and max(spans) > 2
    )
