"""Gradient accumulation: each micro-batch with its own loss, or all with one loss by GradCache."""

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from dist_pca.config import BATCH_KEYS, RunConfig
from dist_pca.data.source import micro_batch_size
from dist_pca.errors import UserError
from dist_pca.objective import Domain, Domains

T = TypeVar("T")
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


class MicroBatch(NamedTuple, Generic[T]):
    """One forward pass, ready for backward."""

    loss: torch.Tensor
    """Scalar; the gradient of an update is the mean of its micro-batches' gradients."""
    terms: dict[str, torch.Tensor]
    """Values to log, by name."""
    domains: Domains
    """Network outputs."""
    batch: T
    """Network inputs."""


def fit_batches(config: RunConfig, world_size: int) -> RunConfig:
    """Set the batches over all ranks of a run that gives them per rank."""
    given = {in_all: getattr(config.training, per_rank) for in_all, per_rank in BATCH_KEYS.items()}
    update = {in_all: world_size * batch for in_all, batch in given.items() if batch is not None}
    return config.model_copy(update={"training": config.training.model_copy(update=update)})


def fit_accumulation(config: RunConfig, world_size: int) -> RunConfig:
    """Set batches as `fit_batches`, and the least accumulation that `training.max_micro_batch` allows, if it is set.

    Args:
        config: The run.
        world_size: Number of ranks.

    Raises:
        UserError: the batches cannot be divided evenly over ranks, or over any such number of micro-batches.
    """
    config = fit_batches(config, world_size)
    training = config.training
    if training.max_micro_batch is None:
        for domain in ("source", "target"):
            batch = getattr(training, f"{domain}_batch_per_rank")
            if batch is not None and batch % training.accumulation:
                raise UserError(
                    f"training.{domain}_batch_per_rank: {batch} samples cannot be divided evenly into "
                    f"training.accumulation={training.accumulation} micro-batches; use a multiple of that"
                )
        return config
    images = [
        micro_batch_size(batch, world_size=world_size, accumulation=1, key=key) for key, batch in config.batches.items()
    ]
    shared = gcd(*images)
    for accumulation in range(1, shared + 1):
        if shared % accumulation == 0 and max(images) <= accumulation * training.max_micro_batch:
            fitted = training.model_copy(update={"accumulation": accumulation})
            return config.model_copy(update={"training": fitted})
    raise UserError(
        f"training.max_micro_batch: a rank's {' and '.join(map(str, images))} images of the two domains cannot be "
        f"divided evenly into micro-batches of at most {training.max_micro_batch}; use {max(images) // shared} or more"
    )


def separate_losses(
    next_batch: Callable[[], T], forward: Callable[[T], Domains], loss_of: Callable[[Domains], Loss], count: int
) -> Iterator[MicroBatch[T]]:
    """Yield `count` micro-batches, each with its own loss."""
    for _ in range(count):
        batch = next_batch()
        domains = forward(batch)
        yield MicroBatch(*loss_of(domains), domains, batch)
        # Frees its activations before the next ones are allocated.
        del batch, domains


def grad_cache(
    next_batch: Callable[[], T],
    forward: Callable[[T], Domains],
    loss_of: Callable[[Domains], Loss],
    count: int,
    module: torch.nn.Module,
) -> Iterator[MicroBatch[T]]:
    """Yield `count` micro-batches whose gradients sum to that of one loss over all (GradCache, Gao et al. 2021).

    A first pass without gradients computes the outputs of every micro-batch. One loss over all of them gives a gradient
    for each output. A second pass, one micro-batch at a time, backpropagates it through the network. This needs no more
    memory for activations than `separate_losses`, and one more forward pass. Dropout masks are the same in both passes;
    buffers, such as running statistics, are updated in the second alone.

    Args:
        next_batch: Returns a micro-batch.
        forward: Returns the network's outputs for it.
        loss_of: Returns the loss and its terms for the outputs of one or of many micro-batches.
        count: Number of micro-batches.
        module: The network, for its buffers.
    """
    batches = [next_batch() for _ in range(count)]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad(), torch.random.fork_rng(devices):
        outputs = [forward(batch) for batch in batches]
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    combined = Domains(*(_concatenate_domain(views) for views in zip(*outputs, strict=True)))  # type: ignore[arg-type]
    loss, terms = loss_of(combined)
    gradients = torch.autograd.grad(loss, _outputs(combined), allow_unused=True)
    terms = {name: value.detach() for name, value in terms.items()}
    # All that the second pass needs of the first one's outputs is their gradients.
    del outputs, combined, loss
    parts = [None if g is None else g.chunk(count) for g in gradients]
    for index, batch in enumerate(batches):
        domains = forward(batch)
        products = [
            (values.float() * part[index]).sum()
            for values, part in zip(_outputs(domains), parts, strict=True)
            if part is not None
        ]
        # Only the gradient of this sum is meaningful. The factor turns the mean over micro-batches into a sum.
        yield MicroBatch(count * torch.stack(products).sum(), terms, domains, batch)


def _outputs(domains: Domains) -> list[torch.Tensor]:
    """Tensors that the network has computed, one domain after the other."""
    return [
        values
        for domain in domains
        if domain is not None
        for values in (domain.logits, domain.features, domain.deepest)
        if values is not None
    ]


def _concatenate_domain(views: Sequence[Domain | None]) -> Domain | None:
    """Concatenate one domain's micro-batches, with the network's outputs as fp32 leaves that require gradients."""
    domains = [domain for domain in views if domain is not None]
    if not domains:
        return None
    combined = Domain(*(_concatenate(values) for values in zip(*domains, strict=True)))
    return combined._replace(
        logits=combined.logits.float().requires_grad_(),
        features=combined.features.float().requires_grad_(),
        deepest=None if combined.deepest is None else combined.deepest.float().requires_grad_(),
    )


def _concatenate(values: Sequence[Any]) -> Any:
    if torch.is_tensor(values[0]):
        return torch.cat(list(values))
    return None if values[0] is None else [item for part in values for item in part]
