"""What every rank must know of every other before association starts, and the errors that all ranks raise together.

A wrong tensor on one rank would leave the others waiting in a collective, or go unnoticed in everyone's loss. So ranks
first tell each other what they hold, in one small all-gather, and each judges the whole table.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist

from dist_pca.association.exchange import world_size
from dist_pca.association.phases import phase


class Held(NamedTuple):
    """One rank's inputs in numbers; sizes are -1 where a tensor has not the right number of dimensions."""

    pools: int
    source_rows: int
    source_channels: int
    target_rows: int
    target_channels: int
    smallest_pool: int
    labels: int
    target_labels: int
    source_not_finite: int
    target_not_finite: int
    lowest_label: int
    highest_label: int
    lowest_target_label: int
    highest_target_label: int
    settings: int
    gradients: int


def shake_hands(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    target_labels: Sequence[torch.Tensor] | None,
    *,
    num_classes: int,
    ignore_index: int,
    settings: Hashable,
) -> list[Held]:
    """Every rank's inputs, in rank order. Collective over the world.

    Args:
        sources: Pools of [n, C].
        targets: Pools of [m, C].
        labels: Pools of [n].
        target_labels: Pools of [m], or None.
        num_classes: Labels are below it.
        ignore_index: The one other label there may be.
        settings: Arguments that must be the same on every rank.

    Raises:
        ValueError: on every rank together, naming each rank and tensor that is wrong.
    """
    own = _held(sources, targets, labels, target_labels, ignore_index, settings)
    ranks = world_size()
    numbers = torch.tensor(own, dtype=torch.int64, device=sources[0].device)
    table = [torch.empty_like(numbers) for _ in range(ranks)]
    if ranks > 1:
        with phase("exchange"):
            dist.all_gather(table, numbers)
    else:
        table = [numbers]
    everyone = [Held(*row.tolist()) for row in table]
    wrong = [
        f"rank {rank}: {problem}" if ranks > 1 else problem
        for rank, held in enumerate(everyone)
        for problem in _problems(held, everyone[0], num_classes, ignore_index)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return everyone


def _held(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    target_labels: Sequence[torch.Tensor] | None,
    ignore_index: int,
    settings: Hashable,
) -> Held:
    lowest, highest = _range(labels, ignore_index)
    lowest_target, highest_target = _range(target_labels or (), ignore_index)
    return Held(
        pools=len(sources),
        source_rows=_rows(sources, 2),
        source_channels=_channels(sources),
        target_rows=_rows(targets, 2),
        target_channels=_channels(targets),
        smallest_pool=min((len(rows) for rows in (*sources, *targets) if rows.ndim), default=0),
        labels=_rows(labels, 1),
        target_labels=_rows(targets if target_labels is None else target_labels, 2 if target_labels is None else 1),
        source_not_finite=_not_finite(sources),
        target_not_finite=_not_finite(targets),
        lowest_label=lowest,
        highest_label=highest,
        lowest_target_label=lowest_target,
        highest_target_label=highest_target,
        settings=crc32(repr(settings).encode()),
        gradients=int(torch.is_grad_enabled() and any(rows.requires_grad for rows in (*sources, *targets))),
    )


def _problems(held: Held, first: Held, num_classes: int, ignore_index: int) -> list[str]:
    source = f"source [{held.source_rows}, {held.source_channels}]"
    target = f"target [{held.target_rows}, {held.target_channels}]"
    problems = []
    if held.settings != first.settings or held.pools != first.pools:
        problems.append("was called with other arguments than rank 0")
    if held.gradients != first.gradients:
        problems.append("wants gradients and rank 0 does not, or the reverse; give all ranks inputs of one kind")
    if min(held[1:5]) < 0 or held.source_channels != held.target_channels:
        problems.append(f"{source} and {target} must be [n, C] with the same C")
    elif held.source_channels != first.source_channels:
        problems.append(f"{source} has other channels than rank 0, which has {first.source_channels}")
    elif held.smallest_pool == 0:
        problems.append(f"{source} or {target} has a pool without positions; every rank needs some of both domains")
    if held.labels != held.source_rows:
        problems.append(f"labels [{held.labels}] must be [{held.source_rows}], one for each source row")
    if held.target_labels != held.target_rows:
        problems.append(f"target_labels [{held.target_labels}] must be [{held.target_rows}], one for each target row")
    for name, count in (("source", held.source_not_finite), ("target", held.target_not_finite)):
        if count > 0:
            problems.append(f"{name} has {count} values that are NaN or infinite")
    for name, lowest, highest in (
        ("labels", held.lowest_label, held.highest_label),
        ("target_labels", held.lowest_target_label, held.highest_target_label),
    ):
        if lowest < 0 or highest >= num_classes:
            problems.append(
                f"{name} range from {lowest} to {highest}; they must be 0 to {num_classes - 1}, or {ignore_index}"
            )
    return problems


def _rows(pools: Sequence[torch.Tensor], dimensions: int) -> int:
    return sum(len(pool) for pool in pools) if all(pool.ndim == dimensions for pool in pools) else -1


def _channels(pools: Sequence[torch.Tensor]) -> int:
    channels = {pool.shape[1] if pool.ndim == 2 else -1 for pool in pools}
    return channels.pop() if len(channels) == 1 else -1


def _not_finite(pools: Sequence[torch.Tensor]) -> int:
    return sum(int(pool.numel() - torch.isfinite(pool.detach()).sum()) for pool in pools)


def _range(pools: Sequence[torch.Tensor], ignore_index: int) -> tuple[int, int]:
    known = [pool[pool != ignore_index] for pool in pools]
    filled = [pool for pool in known if len(pool)]
    return (
        min((int(pool.min()) for pool in filled), default=0),
        max((int(pool.max()) for pool in filled), default=0),
    )
