"""The cycle association loss over a pool of ranks."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist

from dist_pca.association import reference
from dist_pca.association.engine import Found, Options, streamed
from dist_pca.association.exchange import all_gather, all_reduce_sum, world_size
from dist_pca.association.handshake import Held, shake_hands
from dist_pca.association.phases import phase
from dist_pca.association.pool import Pool
from dist_pca.association.similarity import Similarity, keys, normalised

Implementation = Literal["auto", "reference", "blockwise", "triton"]
ExchangeChoice = Literal["auto", "gather", "ring", "local"]
Precision = Literal["fp32", "bf16"]

GATHER_BYTES = 4 << 30
"""Up to this many bytes of gathered keys and their gradients on a rank, `auto` gathers; beyond, it takes the ring."""
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_log = logging.getLogger("dist_pca.association")


@dataclass(frozen=True)
class Association:
    """The loss and what the cycles did. Counts are over all ranks."""

    loss: torch.Tensor
    """Scalar with a graph on every rank, 0 where no rank keeps a cycle. Gradients averaged over ranks are those of
    `-(1/n) sum [log p(i -> j*) + log p(j* -> i*)]` over the n kept cycles of all ranks; so is the value's mean."""
    kept: torch.Tensor
    """Number of kept cycles."""
    cover_ratio: torch.Tensor
    """Share of target positions that some source position matched."""
    consistent_ratio: torch.Tensor
    """Share of labelled source positions whose cycle ends in their own class."""
    correct_ratio: torch.Tensor
    """Share of matches whose target truly has the source's class, where target labels are given; else nan."""
    kept_per_class: torch.Tensor
    """int64 [num_classes], kept cycles by class."""
    nats_over_chance: torch.Tensor
    """`ln N_s + ln N_t - loss`: how far both directions together are above a uniform choice from the pool."""
    exchanged_bytes: torch.Tensor
    """int64, bytes of keys, matches and gradients that each rank has sent to others, mean over ranks."""


def associate(
    source: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: ExchangeChoice = "auto",
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
    dtype: Precision = "fp32",
    wire_dtype: Precision = "fp32",
    deterministic: bool = False,
) -> Association:
    """Cycle association loss of this rank's source positions (PLCA, section 3.1).

    Matches and softmax denominators run over the positions of all ranks of the group, or with `exchange="local"` over
    this rank's alone. Either way the mean is over the kept cycles of all ranks of the world, and the gradient that
    DDP or ZeRO averages over ranks is that of one process on the concatenated batch. Collective: all ranks of the world
    must call it, with any number of rows from 1. All that is exchanged is exchanged in this call; the backward pass
    needs no other rank, and all ranks must scale the loss alike.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] likewise.
        labels: [n_s] integer labels of the source rows.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        num_classes: Labels are below it.
        target_labels: [n_t] integer labels, for `correct_ratio` alone.
        group: Ranks that form one pool; None is the world.
        exchange: `gather` holds all ranks' keys on every rank; `ring` passes them round, so that memory does not grow
            with the ranks; `auto` gathers while that fits into `GATHER_BYTES`; `local` keeps the pool to this rank.
        ignore_index: Label that neither starts nor ends a cycle.
        detach_statistics: Stop the gradient through each row's mean and standard deviation.
        implementation: `reference` (dense; gathers), `blockwise` (streamed, plain PyTorch), `triton` (fused, on GPUs),
            or the fastest that can run.
        dtype: Type of the operands of matrix products in `blockwise` and `triton`; sums are fp32, or fp64 for fp64
            inputs.
        wire_dtype: Type of keys on their way between ranks; products in bf16 let them travel in bf16 anyway.
        deterministic: Same bits on every run, on a GPU too.

    Raises:
        ValueError: on all ranks together, if on any of them shapes do not fit, values are not finite, labels are out of
            range or there are no rows; ranks and tensors are named. Or `triton` cannot run on this device.
    """
    return _associate(
        [source],
        [target],
        [labels],
        None if target_labels is None else [target_labels],
        similarity,
        num_classes,
        group,
        exchange,
        ignore_index,
        detach_statistics,
        implementation,
        dtype,
        wire_dtype,
        deterministic,
    )


def associate_pairs(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: Sequence[torch.Tensor] | None = None,
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
    dtype: Precision = "fp32",
    deterministic: bool = False,
) -> Association:
    """As `associate`, for several pools on this rank: the k-th source positions with the k-th target positions, as in
    the paper. The mean is over the kept cycles of all pools and ranks together.
    """
    return _associate(
        sources,
        targets,
        labels,
        target_labels,
        similarity,
        num_classes,
        None,
        "local",
        ignore_index,
        detach_statistics,
        implementation,
        dtype,
        "fp32",
        deterministic,
    )


def _associate(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    target_labels: Sequence[torch.Tensor] | None,
    similarity: Similarity,
    num_classes: int,
    group: dist.ProcessGroup | None,
    exchange: ExchangeChoice,
    ignore_index: int,
    detach_statistics: bool,
    implementation: Implementation,
    dtype: Precision,
    wire_dtype: Precision,
    deterministic: bool,
) -> Association:
    device = sources[0].device
    settings = (similarity, num_classes, exchange, ignore_index, detach_statistics, implementation, dtype, wire_dtype)
    everyone = shake_hands(
        sources,
        targets,
        labels,
        target_labels,
        num_classes=num_classes,
        ignore_index=ignore_index,
        settings=settings,
    )
    members = [] if exchange == "local" or world_size(group) == 1 else _members(group)
    if implementation == "auto":
        implementation = _fastest(device, dtype)
    pool = Pool("local", group, 0, 1)
    if members:
        held = [everyone[rank] for rank in members]
        chosen = exchange if exchange in ("gather", "ring") else _exchange(held, dtype)
        pool = Pool(chosen, group, dist.get_rank(group), len(members), _DTYPES[wire_dtype])
    _say_once(implementation, pool.exchange, pool.ranks, dtype)

    loss_sum = torch.zeros((), device=device)
    # Kept, labelled, compared, correct; targets matched, targets; chance.
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    kept_per_class = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for index, (source, target, label) in enumerate(zip(sources, targets, labels, strict=True)):
        counts_s = [everyone[rank].source_rows for rank in members] or [len(source)]
        counts_t = [everyone[rank].target_rows for rank in members] or [len(target)]
        options = Options(
            similarity=similarity,
            num_classes=num_classes,
            ignore_index=ignore_index,
            detach_statistics=detach_statistics,
            bf16=dtype == "bf16",
            triton=implementation == "triton",
            deterministic=deterministic,
            source_counts=counts_s,
            target_counts=counts_t,
        )
        # Inside autocast the products would drop to half precision, and with them argmax and deviation.
        with torch.autocast(device.type, enabled=False):
            solve = _dense if implementation == "reference" else streamed
            found = solve(source, target, label.long(), pool, options)
        loss_sum = loss_sum + found.loss_sum
        kept_per_class += torch.bincount(label[found.kept].long(), minlength=num_classes)
        truth = None if target_labels is None else target_labels[index].long()
        first = sum(counts_t[: pool.rank])
        sums += _sums(found, label, truth, first, len(target), math.log(sum(counts_s) * sum(counts_t)), ignore_index)

    sent = torch.tensor([pool.sent_bytes], dtype=torch.float64, device=device)
    with phase("exchange"):
        totals = all_reduce_sum(torch.cat([sums, sent, kept_per_class.double()]))
    kept, labelled, compared, correct, covered, targets_seen, chance, sent_total = totals[:8]
    loss = world_size() * loss_sum / kept.clamp(min=1).to(loss_sum.dtype)
    with phase("exchange"):
        mean_loss = all_reduce_sum(loss) / world_size()
    nan = kept.new_tensor(float("nan"))
    return Association(
        loss=loss,
        kept=kept.long(),
        cover_ratio=covered / targets_seen,
        consistent_ratio=kept / labelled.clamp(min=1),
        correct_ratio=torch.where(compared > 0, correct / compared.clamp(min=1), nan),
        kept_per_class=totals[8:].long(),
        nats_over_chance=torch.where(kept > 0, chance / kept.clamp(min=1) - mean_loss, nan),
        exchanged_bytes=(sent_total / world_size()).long(),
    )


def _dense(source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, pool: Pool, options: Options) -> Found:
    """The reference over the pool, its rows gathered with autograd."""
    source_rows, target_rows = (
        normalised(rows.to(torch.promote_types(rows.dtype, torch.float32)), options.similarity)
        for rows in (source, target)
    )
    source_pool, target_pool = source_rows, target_rows
    if pool.ranks > 1:
        source_pool, target_pool = all_gather(source_rows, pool.group), all_gather(target_rows, pool.group)
    pool_labels = pool.gather(labels, options.source_counts)
    found = reference.cycles(
        source_rows,
        keys(target_pool, options.similarity),
        target_pool,
        keys(source_pool, options.similarity),
        labels,
        pool_labels,
        options.ignore_index,
        options.detach_statistics,
    )
    # Rows go out to every other rank, and gradients of the same size come back.
    others = pool.ranks - 1
    pool.sent_bytes += 2 * others * sum(rows.numel() * rows.element_size() for rows in (source_rows, target_rows))
    matches = pool.gather(found.match, options.source_counts)
    return Found(found.loss_sum, matches, pool_labels, found.returned, found.kept)


def _sums(
    found: Found,
    labels: torch.Tensor,
    truth: torch.Tensor | None,
    first: int,
    targets: int,
    chance: float,
    ignore_index: int,
) -> torch.Tensor:
    """This rank's share: of its own source positions, and of the matches that its own targets received."""
    received = (found.matches >= first) & (found.matches < first + targets)
    place, label = found.matches[received] - first, found.pool_labels[received]
    compared = correct = labels.new_zeros(())
    if truth is not None:
        true_class = truth[place]
        comparable = (label != ignore_index) & (true_class != ignore_index)
        compared, correct = comparable.sum(), (comparable & (true_class == label)).sum()
    kept = found.kept.sum()
    numbers = [kept, (labels != ignore_index).sum(), compared, correct]
    covered = torch.zeros(targets, dtype=torch.bool, device=labels.device)
    covered[place] = True
    numbers += [covered.sum(), labels.new_tensor(targets, dtype=torch.float64), kept.double() * chance]
    return torch.stack([number.double() for number in numbers])


def _members(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def _exchange(held: list[Held], dtype: Precision) -> Literal["gather", "ring"]:
    rows = sum(rank.source_rows + rank.target_rows for rank in held)
    needed = rows * held[0].source_channels * (4 + (2 if dtype == "bf16" else 4))
    return "gather" if needed <= GATHER_BYTES else "ring"


def _fastest(device: torch.device, dtype: Precision) -> Implementation:
    # In fp32 the fused kernels cannot use tensor cores and the vendor's products are faster.
    if device.type == "cuda" and dtype == "bf16":
        from dist_pca.association.triton_kernels import can_run

        if can_run(device):
            return "triton"
    return "blockwise"


@cache
def _say_once(implementation: Implementation, exchange: str, ranks: int, dtype: Precision) -> None:
    if world_size() == 1 or dist.get_rank() == 0:
        pool = f"{exchange} over {ranks} ranks" if ranks > 1 else "each rank's own positions"
        _log.info("association: %s, products in %s, %s", implementation, dtype, pool)
