"""Batch norm over ranks: shared batch statistics, held ones, and the mean of those that ranks kept apart."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_pca.distributed import all_reduce_sum, world_size


class SynchronisedBatchNorm(nn.SyncBatchNorm):
    """Batch norm whose training statistics are those of all ranks' images; a drop-in for one batch-norm layer.

    Takes over the layer's parameters and statistics under the same names, and the activation and drop that timm fuses
    into its batch norms. Ranks may hold batches of different sizes. Sums over ranks are all-reduced, so that a layer of
    C channels sends 48 C bytes in a step on any number of ranks, where torch's own, which gathers statistics, sends
    8 C for each.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.drop = getattr(layer, "drop", nn.Identity())
        self.act = getattr(layer, "act", nn.Identity())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise B x C x h x w, then drop and activate. Collective in training."""
        synchronised = self.training and world_size(self.process_group) > 1
        normal = self._normalise(input) if synchronised else _BatchNorm.forward(self, input)
        output: torch.Tensor = self.act(self.drop(normal))
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        normal, mean, variance, count = _NormaliseOverRanks.apply(
            x, self.weight, self.bias, self.eps, self.process_group
        )
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), share)
        return normal  # type: ignore[no-any-return]


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalised values, and the mean, biased variance and count of values of each channel over all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if not (x.dim() > 3 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        mean, variance, count = _statistics(x, group)
        ctx.group, ctx.eps = group, eps
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.mark_non_differentiable(mean, variance, count)
        normal = F.batch_norm(x, mean, variance, weight, bias, eps=eps) if x.numel() else torch.empty_like(x)
        return normal, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        layout = torch.channels_last if x.dim() > 3 and not x.is_contiguous() else torch.contiguous_format
        gradient = gradients[0].contiguous(memory_format=layout)
        inverse = (variance + ctx.eps).rsqrt()
        # Sums of dy and of dy (x - mean).
        if x.numel() == 0:
            dx, sums = gradient, mean.new_zeros(2, len(mean))
        elif x.is_cuda:
            sums = torch.stack(
                torch.batch_norm_backward_reduce(gradient, x, mean, inverse, weight, True, False, False)[:2]
            )
        else:
            # With statistics that are held, it gives both sums and the part of dx in which the batch has no share.
            dy, values = gradient.to(mean.dtype), x.to(mean.dtype)
            dx, scaled, total = torch.ops.aten.native_batch_norm_backward(
                dy, values, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
            )
            sums = torch.stack([total, scaled / inverse])
        means = all_reduce_sum(sums, ctx.group) / count
        if x.is_cuda and x.numel():
            # It divides sums by a count, in int32, which a large world's images exceed; these are means already.
            one = torch.ones(1, dtype=torch.int32, device=x.device)
            dx = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, weight, *means, one)  # type: ignore[call-arg]
        elif x.numel():
            # dx = slope (dy - means[0] - inverse^2 means[1] (x - mean))
            slope = inverse if weight is None else weight * inverse
            projection = slope * inverse.square() * means[1]
            offset = projection * mean - slope * means[0]
            dx = dx.addcmul_(values, _along(-projection, x)).add_(_along(offset, x)).to(x.dtype)
        if weight is None:
            return dx, None, None, None, None
        return dx, (sums[1] * inverse).to(weight.dtype), sums[0].to(weight.dtype), None, None


def _statistics(x: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [C], biased variance [C] and count [] of each channel's values over ranks, in fp32 or above. Collective.

    Each rank's variance is about its own mean, so that only ranks' means, in fp64, enter a difference of mean square
    and squared mean. The relative error is that of fp32 inputs, about 2^-24 times mean / standard deviation.
    """
    channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    size = x.numel() // channels
    if size == 0:
        variance = mean = torch.zeros(channels, dtype=dtype, device=x.device)
    elif x.is_cuda:
        mean, inverse = torch.batch_norm_stats(x, 0.0)
        # Of a channel with one value everywhere it gives an inverse deviation of 0.
        variance = torch.where(inverse == 0, 0.0, inverse.pow(-2))
    else:
        mean, variance = torch.batch_norm_update_stats(x.to(dtype), None, None, 0.0)
    own = mean.double()
    moments = torch.cat([size * own, size * (variance.double() + own.square()), own.new_full((1,), size)])
    total, squares, count = torch.split(all_reduce_sum(moments, group), [channels, channels, 1])
    mean_of_all = total / count
    variance = (squares / count - mean_of_all.square()).clamp(min=0)
    return mean_of_all.to(dtype), variance.to(dtype), count[0]


def _along(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value for each channel, in the shape that broadcasts with x."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


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


def average_over_ranks(statistics: Collection[torch.Tensor]) -> None:
    """Set running means and variances, in place, to their mean over ranks, so that every rank holds the same network.

    A collective call. Variances are averaged as they are: what ranks' means differ by is not added. Sums are in fp64,
    in which statistics that are equal on all ranks stay as they are, to the last bit, on any number of ranks.
    """
    if not statistics or not dist.is_initialized():
        return
    flat = torch.cat(list(statistics)).double()
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [len(buffer) for buffer in statistics])
    for buffer, mean in zip(statistics, means, strict=True):
        buffer.copy_(mean)
