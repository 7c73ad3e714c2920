"""Batch norm over ranks: shared batch statistics, held ones, and the mean of those that ranks kept apart."""

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


def hold_statistics(module: nn.Module) -> None:
    """Put every batch norm into evaluation mode: running statistics normalise and stay; scale and shift still train."""
    for layer in _batch_norms(module):
        layer.eval()


def average_batch_norm(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Set running means and variances, in place, to their mean over ranks, so that every rank holds the same network.

    A collective call. Variances are averaged as they are: what ranks' means differ by is not added.
    """
    statistics = [
        buffer
        for layer in _batch_norms(module)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if not statistics or not dist.is_initialized():
        return
    flat = torch.cat(statistics)
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    means = torch.split(flat, [len(buffer) for buffer in statistics])
    for buffer, mean in zip(statistics, means, strict=True):
        buffer.copy_(mean)


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
