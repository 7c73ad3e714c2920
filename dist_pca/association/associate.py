"""The cycle association loss over a pool of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from dist_pca.association import blockwise, reference
from dist_pca.association.exchange import all_gather, all_reduce_sum, world_size
from dist_pca.association.reference import Cycles
from dist_pca.association.similarity import Similarity, keys, normalised

Implementation = Literal["auto", "reference", "blockwise"]


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


def associate(
    source: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    gather: bool = True,
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
) -> Association:
    """Cycle association loss of this rank's source positions (PLCA, section 3.1).

    With `gather`, matches and softmax denominators run over the positions of all ranks of the group; otherwise over
    this rank's alone. Either way the mean is over the kept cycles of all ranks of the world, and the gradient that
    DDP or ZeRO averages over ranks is that of one process on the concatenated batch. Collective: all ranks of the world
    must call it, with any number of rows.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] likewise.
        labels: [n_s] integer labels of the source rows.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        num_classes: Length of `kept_per_class`.
        target_labels: [n_t] integer labels, for `correct_ratio` alone.
        group: Ranks that form one pool; None is the world.
        gather: False keeps the pool to this rank.
        ignore_index: Label that neither starts nor ends a cycle.
        detach_statistics: Stop the gradient through each row's mean and standard deviation.
        implementation: `reference` (dense), `blockwise` (streamed), or the fastest that can run.

    Raises:
        ValueError: shapes do not fit together.
    """
    return associate_pairs(
        [source],
        [target],
        [labels],
        similarity=similarity,
        num_classes=num_classes,
        target_labels=None if target_labels is None else [target_labels],
        group=group,
        gather=gather,
        ignore_index=ignore_index,
        detach_statistics=detach_statistics,
        implementation=implementation,
    )


def associate_pairs(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: Sequence[torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    gather: bool = False,
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
) -> Association:
    """As `associate`, for several pools: the k-th source positions with the k-th target positions (the paper's scope).

    The mean is over the kept cycles of all pools and ranks together.
    """
    cycles = reference.cycles if implementation == "reference" else blockwise.cycles
    gather = gather and world_size(group) > 1
    device = sources[0].device
    loss_sum = torch.zeros((), device=device)
    # Sums over pools: kept, labelled, matched, correct; and for cover: targets matched, targets.
    counts = torch.zeros(6, dtype=torch.float64, device=device)
    kept_per_class = torch.zeros(num_classes, dtype=torch.int64, device=device)
    chance = torch.zeros((), dtype=torch.float64, device=device)
    for index, (source, target, label) in enumerate(zip(sources, targets, labels, strict=True)):
        _check(source, target, label)
        source_rows, target_rows = (
            normalised(x.to(torch.promote_types(x.dtype, torch.float32)), similarity) for x in (source, target)
        )
        source_pool, target_pool, pool_labels = source_rows, target_rows, label
        if gather:
            source_pool, target_pool = all_gather(source_rows, group), all_gather(target_rows, group)
            pool_labels = all_gather(label, group)
        if len(source_pool) == 0 or len(target_pool) == 0:
            raise ValueError(
                f"the pool has {len(source_pool)} source and {len(target_pool)} target positions; none may be 0"
            )
        # Inside autocast the products would drop to half precision, and with them argmax and deviation.
        with torch.autocast(device.type, enabled=False):
            found = cycles(
                source_rows,
                keys(target_pool, similarity),
                target_pool,
                keys(source_pool, similarity),
                label,
                pool_labels,
                ignore_index,
                detach_statistics,
            )
        loss_sum = loss_sum + found.loss_sum
        kept_per_class += torch.bincount(label[found.kept], minlength=num_classes)
        chance = chance + found.kept.sum() * math.log(len(source_pool) * len(target_pool))
        truth = None if target_labels is None else target_labels[index]
        if truth is not None and gather:
            truth = all_gather(truth, group)
        counts += _counts(found, label, truth, len(target_pool), group if gather else "rank", ignore_index)

    totals = all_reduce_sum(torch.cat([counts, kept_per_class.double(), chance[None]]))
    kept, labelled, matched, correct, covered, targets_seen = totals[:6]
    loss = world_size() * loss_sum / kept.clamp(min=1).to(loss_sum.dtype)
    mean_loss = all_reduce_sum(loss) / world_size()
    nan = kept.new_tensor(float("nan"))
    return Association(
        loss=loss,
        kept=kept.long(),
        cover_ratio=covered / targets_seen,
        consistent_ratio=kept / labelled.clamp(min=1),
        correct_ratio=correct / matched if matched > 0 else nan,
        kept_per_class=totals[6:-1].long(),
        nats_over_chance=totals[-1] / kept - mean_loss if kept > 0 else nan,
    )


def _check(source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> None:
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(f"source {list(source.shape)} and target {list(target.shape)} must be [n, C] with the same C")
    if labels.shape != source.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} must be [{len(source)}], one for each source row")


def _counts(
    found: Cycles,
    labels: torch.Tensor,
    truth: torch.Tensor | None,
    targets: int,
    pool: dist.ProcessGroup | Literal["rank"] | None,
    ignore_index: int,
) -> torch.Tensor:
    """This rank's share of the sums: kept, labelled, matched, correct, covered targets, targets."""
    labelled = labels != ignore_index
    covered = torch.zeros(targets, dtype=torch.uint8, device=labels.device)
    covered[found.match] = 1
    share = 1.0
    if pool != "rank":
        dist.all_reduce(covered, op=dist.ReduceOp.MAX, group=pool)
        share = 1.0 / world_size(pool)
    matched = correct = labelled.new_zeros(())
    if truth is not None:
        true_class = truth[found.match]
        comparable = labelled & (true_class != ignore_index)
        matched, correct = comparable.sum(), (comparable & (true_class == labels)).sum()
    sums = [
        found.kept.sum(),
        labelled.sum(),
        matched,
        correct,
        covered.sum() * share,
        labels.new_tensor(targets * share, dtype=torch.float64),
    ]
    return torch.stack([value.double() for value in sums])
