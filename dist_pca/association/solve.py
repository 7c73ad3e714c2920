"""One loss over all candidate sets and ranks: validate, find cycles, contrast, reduce."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist

from dist_pca.association import reference, streamed
from dist_pca.association.diagnostics import correct_ratio, count, total
from dist_pca.association.exchange import all_reduce_sum, world_size
from dist_pca.association.options import Implementation, Inputs, Options, Precision
from dist_pca.association.phases import phase
from dist_pca.association.pool import Pool
from dist_pca.association.result import Association
from dist_pca.association.validate import RankInputs, validate

GATHER_BYTES = 4 << 30
"""Memory up to which `auto` gathers the keys of all ranks and their gradients [bytes per rank]; beyond it, `ring`."""
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_log = logging.getLogger("dist_pca.association")


def solve(
    tensors: Mapping[str, Sequence[torch.Tensor] | None], group: dist.ProcessGroup | None, options: Options
) -> Association:
    """Compute the loss and its diagnostics. Collective over the world.

    Args:
        tensors: Inputs by the names of `validate`, one tensor for each candidate set of this rank; None if not given.
        group: Ranks whose pixels are candidates for each other; None is the world.
        options: Equal on all ranks.

    Raises:
        ValueError: on every rank together, naming each rank and tensor that is wrong.
    """
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
