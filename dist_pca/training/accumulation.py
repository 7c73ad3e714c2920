"""The micro-batches of one update, each with its own loss or all with the one of the batch that they make up."""

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from dist_pca.config import RunConfig
from dist_pca.data.order import micro_batch_size
from dist_pca.errors import UserError
from dist_pca.objective import Domain, Domains

T = TypeVar("T")
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


class MicroBatch(NamedTuple, Generic[T]):
    """One forward pass, ready for backward."""

    loss: torch.Tensor
    """Scalar; the gradients of an update are the mean over its micro-batches of this one's."""
    terms: dict[str, torch.Tensor]
    """What to tell of it."""
    domains: Domains
    """What the network said."""
    batch: T
    """What it was shown."""


def fit_accumulation(config: RunConfig, world_size: int) -> RunConfig:
    """The run with the least `training.accumulation` that keeps to its `max_micro_batch`, if it has one.

    Args:
        config: The run.
        world_size: Number of ranks.

    Raises:
        UserError: the batches do not share out evenly over ranks, or not over any such number of micro-batches.
    """
    training = config.training
    if training.max_micro_batch is None:
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
        f"training.max_micro_batch: a rank's {' and '.join(map(str, images))} images of the two domains do not share "
        f"out over micro-batches of at most {training.max_micro_batch}; use {max(images) // shared} or more"
    )


def separate_losses(
    next_batch: Callable[[], T], forward: Callable[[T], Domains], loss_of: Callable[[Domains], Loss], count: int
) -> Iterator[MicroBatch[T]]:
    """`count` micro-batches, each with a loss of its own."""
    for _ in range(count):
        batch = next_batch()
        domains = forward(batch)
        yield MicroBatch(*loss_of(domains), domains, batch)
        # Before the next ones are made.
        del batch, domains


def one_loss(
    next_batch: Callable[[], T],
    forward: Callable[[T], Domains],
    loss_of: Callable[[Domains], Loss],
    count: int,
    module: torch.nn.Module,
) -> Iterator[MicroBatch[T]]:
    """`count` micro-batches whose gradients add up to those of one loss over all of them (GradCache, Gao et al. 2021).

    A first pass without gradients gives what the network says of every micro-batch; the loss of all that, taken once,
    gives a gradient for each output; a second pass, one micro-batch at a time, carries it into the network. No more
    activations are held than by `separate_losses`, for one more forward pass. Dropout draws the same in both passes,
    and buffers, such as running statistics, move in the second alone.

    Args:
        next_batch: Gives a micro-batch.
        forward: Gives the network's outputs for it.
        loss_of: Gives the loss and its terms for outputs, of one or of many micro-batches.
        count: Micro-batches.
        module: The network, for its buffers.
    """
    batches = [next_batch() for _ in range(count)]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad(), torch.random.fork_rng(devices):
        said = [forward(batch) for batch in batches]
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    joined = Domains(*(_joined(views) for views in zip(*said, strict=True)))  # type: ignore[arg-type]
    loss, terms = loss_of(joined)
    gradients = torch.autograd.grad(loss, _outputs(joined), allow_unused=True)
    parts = [None if g is None else g.chunk(count) for g in gradients]
    for index, batch in enumerate(batches):
        domains = forward(batch)
        carried = [
            (values.float() * part[index]).sum()
            for values, part in zip(_outputs(domains), parts, strict=True)
            if part is not None
        ]
        # Its value is no loss; its gradient is. The mean over micro-batches is made a sum.
        yield MicroBatch(count * torch.stack(carried).sum(), terms, domains, batch)


def _outputs(domains: Domains) -> list[torch.Tensor]:
    """What the network has computed, one domain after the other."""
    return [
        values
        for domain in domains
        if domain is not None
        for values in (domain.logits, domain.features, domain.deepest)
        if values is not None
    ]


def _joined(views: Sequence[Domain | None]) -> Domain | None:
    """Join one domain's micro-batches to one; outputs of the network are in fp32 and get a gradient."""
    domains = [domain for domain in views if domain is not None]
    if not domains:
        return None
    joined = Domain(*(_concatenated(values) for values in zip(*domains, strict=True)))
    return joined._replace(
        logits=joined.logits.float().requires_grad_(),
        features=joined.features.float().requires_grad_(),
        deepest=None if joined.deepest is None else joined.deepest.float().requires_grad_(),
    )


def _concatenated(values: Sequence[Any]) -> Any:
    if torch.is_tensor(values[0]):
        return torch.cat(list(values))
    return None if values[0] is None else [item for part in values for item in part]
