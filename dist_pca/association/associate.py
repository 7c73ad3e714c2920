"""The cycle association loss over a pool of ranks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist

from dist_pca.association import reference, streamed
from dist_pca.association.diagnostics import correct_ratio, count, total
from dist_pca.association.exchange import all_reduce_sum, world_size
from dist_pca.association.options import ExchangeChoice, Implementation, Inputs, Options, Precision
from dist_pca.association.phases import phase
from dist_pca.association.pool import Pool
from dist_pca.association.similarity import Similarity
from dist_pca.association.validate import RankInputs, validate

GATHER_BYTES = 4 << 30
"""Up to this many bytes of gathered keys and their gradients on a rank, `auto` gathers; beyond, it takes the ring."""
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_log = logging.getLogger("dist_pca.association")


@dataclass(frozen=True)
class Association:
    """The loss and what the cycles did. Counts are over all ranks."""

    loss: torch.Tensor
    """Scalar with a graph on every rank, 0 where no rank keeps a cycle that weighs anything. Gradients averaged over
    ranks are those of `-sum_i w_i [log p(i -> j*) + log p(j* -> i*)] / sum_i w_i` over the kept cycles of all ranks; so
    is the value's mean. Class-balanced, it is the mean over classes of that mean within each."""
    kept: torch.Tensor
    """Number of kept cycles: those that are consistent."""
    cover_ratio: torch.Tensor
    """Share of target pixels that some source pixel matched."""
    consistent_ratio: torch.Tensor
    """Share of labelled source pixels whose cycle is consistent."""
    correct_ratio: torch.Tensor
    """Share of matches whose target truly has the source's class, where target labels are given; else nan."""
    kept_correct_ratio: torch.Tensor
    """Share of kept cycles whose matched target truly has the source's class, where target labels are given; else
    nan."""
    kept_per_class: torch.Tensor
    """int64 [num_classes], kept cycles by class."""
    confusion: torch.Tensor
    """int64 [num_classes, num_classes], matches by class of the source pixel and true class of the matched target
    pixel, where both are known; zeros without target labels."""
    kept_confusion: torch.Tensor
    """int64 [num_classes, num_classes], those of kept cycles."""
    nats_over_chance: torch.Tensor
    """`ln N_s + ln N_t - loss`: the InfoNCE lower bound on mutual information, of both directions together. Over
    several pools the first two are means with the loss's weights; nan where it has none."""
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
    target_classes: torch.Tensor | None = None,
    target_weights: torch.Tensor | None = None,
    class_balanced: bool = False,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    guide_keys: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: ExchangeChoice = "auto",
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
    dtype: Precision = "fp32",
    wire_dtype: Precision = "fp32",
    deterministic: bool = False,
) -> Association:
    """Cycle association loss of this rank's source pixels (PLCA, section 3.1).

    Matches and softmax denominators run over the pixels of all ranks of the group, or with `exchange="local"` over
    this rank's alone. Either way the mean is over the kept cycles of all ranks of the world, and the gradient that
    DDP or ZeRO averages over ranks is that of one process on the concatenated batch. Collective: all ranks of the world
    must call it, with any number of rows from 1, and all or none of them with each optional input except
    `target_labels`. All that is exchanged is exchanged in this call; the backward pass needs no other rank, and all
    ranks must scale the loss alike.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] likewise.
        labels: [n_s] integer labels of the source rows.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        num_classes: Labels are below it.
        target_labels: [n_t] integer labels, for diagnosis alone.
        target_classes: [n_t] integer classes that a teacher sees at the target pixels, `ignore_index` where it is
            unsure. A cycle is then consistent only where that of its matched target is the source label too.
        target_weights: [n_t] numbers from 0, a teacher's confidence: the weight of every cycle through each target
            pixel.
        class_balanced: Take the mean within each class, and then over the classes that have a kept cycle that weighs
            anything, on whatever rank.
        guide: [n_s, C'] and [n_t, C'] rows without gradient, say a teacher's features or probabilities, that choose the
            matches of both directions in place of `source` and `target`.
        guide_keys: The guide's rows are the keys of both softmaxes too, and the gradient flows into queries alone, as
            in momentum contrast (MoCo, He et al., CVPR 2020); C' must be C.
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
        ValueError: on all ranks together, if on any of them shapes do not fit, values are not finite, weights are
            negative, labels are out of range, there are no rows, or an optional input is missing; ranks and tensors are
            named. Or `triton` cannot run on this device.
    """
    options = Options(
        num_classes=num_classes,
        similarity=similarity,
        ignore_index=ignore_index,
        detach_statistics=detach_statistics,
        class_balanced=class_balanced,
        guide_keys=guide_keys,
        exchange=exchange,
        implementation=implementation,
        dtype=dtype,
        wire_dtype=wire_dtype,
        deterministic=deterministic,
    )
    tensors = {
        "source": source,
        "target": target,
        "labels": labels,
        "target_labels": target_labels,
        "target_classes": target_classes,
        "target_weights": target_weights,
        "guide source": None if guide is None else guide[0],
        "guide target": None if guide is None else guide[1],
    }
    return _associate({name: None if x is None else [x] for name, x in tensors.items()}, group, options)


def associate_pairs(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: Sequence[torch.Tensor] | None = None,
    target_classes: Sequence[torch.Tensor] | None = None,
    target_weights: Sequence[torch.Tensor] | None = None,
    class_balanced: bool = False,
    guide: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None,
    guide_keys: bool = False,
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
    dtype: Precision = "fp32",
    deterministic: bool = False,
) -> Association:
    """Cycle association loss of several pools on this rank: k-th source with k-th target pixels, as in the paper.

    Every tensor of `associate` is a list here, one entry for each pool; the guide is a list of source rows and one of
    target rows. The mean is over the kept cycles of all pools and ranks together. Collective; raises what `associate`
    raises.
    """
    options = Options(
        num_classes=num_classes,
        similarity=similarity,
        ignore_index=ignore_index,
        detach_statistics=detach_statistics,
        class_balanced=class_balanced,
        guide_keys=guide_keys,
        exchange="local",
        implementation=implementation,
        dtype=dtype,
        deterministic=deterministic,
    )
    tensors = {
        "source": sources,
        "target": targets,
        "labels": labels,
        "target_labels": target_labels,
        "target_classes": target_classes,
        "target_weights": target_weights,
        "guide source": None if guide is None else guide[0],
        "guide target": None if guide is None else guide[1],
    }
    return _associate(tensors, None, options)


def _associate(
    tensors: Mapping[str, Sequence[torch.Tensor] | None], group: dist.ProcessGroup | None, options: Options
) -> Association:
    everyone = validate(tensors, options)
    pools = _inputs(tensors)
    device = pools[0].source.device
    members = [] if options.exchange == "local" or world_size(group) == 1 else _members(group)
    if options.implementation == "auto":
        options = replace(options, implementation=_fastest(device, options.dtype))
    candidates = [_pool(inputs, [everyone[rank] for rank in members], group, options) for inputs in pools]
    _log_once(options.implementation, candidates[0].exchange, candidates[0].ranks, options.dtype)
    find_cycles = reference.find_cycles if options.implementation == "reference" else streamed.find_cycles
    confusion = any(rank.tensors["target_labels"].given for rank in everyone)

    loss_sum = torch.zeros((), device=device)
    counts, uncontrasted = [], []
    # Inside autocast the products would drop to half precision, and with them argmax and deviation.
    with torch.autocast(device.type, enabled=False):
        for inputs, pool in zip(pools, candidates, strict=True):
            cycles = find_cycles(inputs, pool, options)
            counts.append(count(inputs, cycles, pool, options, confusion=confusion))
            if options.class_balanced:
                uncontrasted.append(cycles.contrast)
            else:
                loss_sum = loss_sum + cycles.contrast(None)
            # Before the next pool takes as much.
            del cycles
        with phase("exchange"):
            sums = total(counts)
        # The mean is `sum_i w_i s_y(i) l_i / sum_i w_i s_y(i)`, with scales s = 1, or 1 / sum of w over the class.
        scale = torch.ones_like(sums.weight)
        if options.class_balanced:
            scale = torch.where(sums.weight > 0, 1 / sums.weight, 0)
        while uncontrasted:
            loss_sum = loss_sum + uncontrasted.pop(0)(scale)

    weight, kept = (sums.weight * scale).sum(), sums.kept.sum()
    loss = world_size() * loss_sum / torch.where(weight > 0, weight, 1).to(loss_sum.dtype)
    sent = weight.new_tensor(sum(pool.sent_bytes for pool in candidates))
    with phase("exchange"):
        mean_loss, mean_sent = all_reduce_sum(torch.stack([loss.detach().double(), sent])) / world_size()
    matrices = sums.confusion if confusion else sums.confusion.new_zeros((2, *sums.confusion.shape[1:]))
    return Association(
        loss=loss,
        kept=kept.long(),
        cover_ratio=sums.covered / sums.targets,
        consistent_ratio=kept / sums.labelled.clamp(min=1),
        correct_ratio=correct_ratio(matrices[0]),
        kept_correct_ratio=correct_ratio(matrices[1]),
        kept_per_class=sums.kept.long(),
        confusion=matrices[0].long(),
        kept_confusion=matrices[1].long(),
        # Without weight this is 0 / 0.
        nats_over_chance=(sums.chance * scale).sum() / weight - mean_loss,
        exchanged_bytes=mean_sent.long(),
    )


def _inputs(tensors: Mapping[str, Sequence[torch.Tensor] | None]) -> list[Inputs]:
    """Take the validated tensors apart by pool; labels in int64, and no gradient where none is wanted."""
    source = tensors["source"]
    assert source is not None
    columns = [x if x is not None else [None] * len(source) for x in tensors.values()]
    pools = []
    for s, t, labels, truth, classes, weights, guide_source, guide_target in zip(*columns, strict=True):
        assert s is not None
        assert t is not None
        assert labels is not None
        guide = None
        if guide_source is not None and guide_target is not None:
            guide = guide_source.detach(), guide_target.detach()
        truth, classes = (None if x is None else x.long() for x in (truth, classes))
        weights = None if weights is None else weights.detach()
        pools.append(Inputs(s, t, labels.long(), truth, classes, weights, guide))
    return pools


def _pool(inputs: Inputs, members: list[RankInputs], group: dist.ProcessGroup | None, options: Options) -> Pool:
    """Ranks whose pixels are candidates for those of one pool: the members, or this rank alone where there are none."""
    if not members:
        return Pool("local", group, 0, 1, [len(inputs.source)], [len(inputs.target)])
    exchange = options.exchange if options.exchange in ("gather", "ring") else _exchange(members, options.dtype)
    return Pool(
        exchange,
        group,
        dist.get_rank(group),
        len(members),
        [rank.source_rows for rank in members],
        [rank.target_rows for rank in members],
        _DTYPES[options.wire_dtype],
    )


def _members(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def _exchange(members: list[RankInputs], dtype: Precision) -> Literal["gather", "ring"]:
    rows = sum(rank.source_rows + rank.target_rows for rank in members)
    needed = rows * members[0].channels * (4 + (2 if dtype == "bf16" else 4))
    return "gather" if needed <= GATHER_BYTES else "ring"


def _fastest(device: torch.device, dtype: Precision) -> Implementation:
    # In fp32 the fused kernels cannot use tensor cores and the vendor's products are faster.
    if device.type == "cuda" and dtype == "bf16":
        from dist_pca.association.triton_kernels import can_run

        if can_run(device):
            return "triton"
    return "blockwise"


@cache
def _log_once(implementation: Implementation, exchange: str, ranks: int, dtype: Precision) -> None:
    if world_size() == 1 or dist.get_rank() == 0:
        pool = f"{exchange} over {ranks} ranks" if ranks > 1 else "each rank's own positions"
        _log.info("association: %s, products in %s, %s", implementation, dtype, pool)
