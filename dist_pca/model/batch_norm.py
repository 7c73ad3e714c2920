"""Batch norm over ranks: shared batch statistics, held ones, and the mean of those that ranks kept apart."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SynchronisedBatchNorm(nn.SyncBatchNorm):
    """Batch norm whose training statistics are those of all ranks' images; a drop-in for one batch-norm layer.

    Takes over the layer's parameters and statistics under the same names, and the activation and drop that timm fuses
    into its batch norms. On accelerators the normalisation is torch's own; torch refuses CPU tensors, so here it is
    written out for them. Ranks may hold batches of different sizes.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.drop = getattr(layer, "drop", nn.Identity())
        self.act = getattr(layer, "act", nn.Identity())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise B x C x h x w, then drop and activate."""
        on_cpu = input.device.type == "cpu" and self.training and dist.is_initialized()
        normal = self._normalise_on_cpu(input) if on_cpu else super().forward(input)
        output: torch.Tensor = self.act(self.drop(normal))
        return output

    def _normalise_on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float().transpose(0, 1).flatten(1)
        count = values.new_tensor([values.shape[1]])
        dist.all_reduce(count, group=self.process_group)
        mean = _SumOverRanks.apply(values.sum(1), self.process_group) / count
        centred = values - mean[:, None]
        # Two passes: the difference of mean square and squared mean loses all digits where the mean is large.
        variance = _SumOverRanks.apply(centred.square().sum(1), self.process_group) / count
        self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        shape = (1, -1) + (1,) * (x.dim() - 2)
        normal: torch.Tensor = (x.float() - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; every rank's loss depends on it, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = values.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def synchronise(module: nn.Module) -> None:
    """Replace every batch norm inside a module by one whose training statistics are those of all ranks."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, SynchronisedBatchNorm(child))
        else:
            synchronise(child)


def hold_statistics(module: nn.Module, *, frozen_only: bool = False) -> None:
    """Put batch norms into evaluation mode: running statistics normalise and stay; scale and shift may still train.

    Args:
        module: The network.
        frozen_only: Only those whose scale and shift are not trained.
    """
    for layer in module.modules():
        own = [parameter.requires_grad for parameter in layer.parameters(recurse=False)]
        if isinstance(layer, _BatchNorm) and (not frozen_only or (own and not any(own))):
            layer.eval()


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are while the context is open; batches still normalise themselves."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    yield
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def track_forward_only(network: nn.Module) -> None:
    """Keep running statistics still where activation checkpointing computes a part of the network anew in backward."""
    in_forward = False
    momenta: dict[nn.Module, float | None] = {}

    def switch(inside: bool) -> None:
        nonlocal in_forward
        in_forward = inside

    def before(layer: nn.Module, _inputs: object) -> None:
        if layer.training and not in_forward:
            # With a momentum of zero the same tensors are saved for backward as in the forward pass.
            momenta[layer], layer.momentum = layer.momentum, 0.0  # type: ignore[assignment]

    def after(layer: nn.Module, _inputs: object, _output: object) -> None:
        if layer in momenta:
            layer.momentum = momenta.pop(layer)  # type: ignore[assignment]
            layer.num_batches_tracked.sub_(1)  # type: ignore[operator]

    network.register_forward_pre_hook(lambda *_: switch(True))
    network.register_forward_hook(lambda *_: switch(False), always_call=True)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(before)
            # Computing anew ends by an exception at the last tensor that is needed.
            layer.register_forward_hook(after, always_call=True)


def running_statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances of every batch norm, by the name that a state dict has for them."""
    return {
        f"{name}.{statistic}" if name else statistic: getattr(layer, statistic)
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        for statistic in ("running_mean", "running_var")
        if getattr(layer, statistic) is not None
    }


def average_over_ranks(statistics: Collection[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Set running means and variances, in place, to their mean over ranks, so that every rank holds the same network.

    A collective call. Variances are averaged as they are: what ranks' means differ by is not added.
    """
    if not statistics or not dist.is_initialized():
        return
    flat = torch.cat(list(statistics))
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    means = torch.split(flat, [len(buffer) for buffer in statistics])
    for buffer, mean in zip(statistics, means, strict=True):
        buffer.copy_(mean)
