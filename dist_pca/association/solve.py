"""One loss over all candidate sets and ranks: validate, find cycles, contrast, reduce."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist

from dist_pca.association import method, streamed
from dist_pca.association.candidates import CandidateGroup, phase
from dist_pca.association.options import Implementation, Inputs, Options, Precision
from dist_pca.association.result import Association, correct_ratio, count, total
from dist_pca.association.validate import RankMetadata, validate
from dist_pca.distributed import all_reduce_sum, world_size

GATHER_BYTES = 4 << 30
"""Memory up to which `auto` gathers the keys of all ranks and their gradients [bytes per rank]; beyond it, `ring`."""
_COMM_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_log = logging.getLogger("dist_pca.association")


def solve(
    tensors: Mapping[str, Sequence[torch.Tensor] | None], process_group: dist.ProcessGroup | None, options: Options
) -> Association:
    """Compute the loss and its diagnostics. Collective over the world.

    Args:
        tensors: Inputs by the names of `validate`, one tensor for each candidate set of this rank; None if not given.
        process_group: Ranks whose pixels are candidates for each other; None is the world.
        options: Equal on all ranks.

    Raises:
        ValueError: on every rank together, naming each rank and tensor that is wrong.
    """
    metadata = validate(tensors, options)
    candidate_sets = _inputs(tensors)
    device = candidate_sets[0].source.device
    local = options.exchange == "local" or world_size(process_group) == 1
    members = [] if local else dist.get_process_group_ranks(process_group or dist.group.WORLD)
    if options.implementation == "auto":
        options = replace(options, implementation=_fastest(device, options.dtype))
    groups = [
        _candidate_group(inputs, [metadata[rank] for rank in members], process_group, options)
        for inputs in candidate_sets
    ]
    _log_once(options.implementation, groups[0].communication, groups[0].ranks, options.dtype)
    find_cycles = method.find_cycles if options.implementation == "reference" else streamed.find_cycles
    confusion = any(rank.tensors["target_labels"].given for rank in metadata)

    loss_sum = torch.zeros((), device=device)
    counts, contrasts = [], []
    # Autocast would compute similarities in half precision, and with them argmax and standard deviation.
    with torch.autocast(device.type, enabled=False):
        for inputs, candidates in zip(candidate_sets, groups, strict=True):
            cycles = find_cycles(inputs, candidates, options)
            counts.append(count(inputs, cycles, candidates, options, confusion=confusion))
            if options.class_balanced:
                # Their scale is not known before all candidate sets are counted.
                contrasts.append(cycles.contrast)
            else:
                loss_sum = loss_sum + cycles.contrast(None)
            # Free its memory before the next candidate set allocates as much.
            del cycles
        with phase("exchange"):
            sums = total(counts)
        # Class scales s_c = 1, or 1 / (sum of w_i over class c).
        scale = torch.ones_like(sums.weight)
        if options.class_balanced:
            scale = torch.where(sums.weight > 0, 1 / sums.weight, 0)
        while contrasts:
            loss_sum = loss_sum + contrasts.pop(0)(scale)

    # L = sum_i w_i s_y(i) l_i / sum_i w_i s_y(i), times the world size because ranks' gradients are averaged.
    weight, kept = (sums.weight * scale).sum(), sums.kept.sum()
    loss = world_size() * loss_sum / torch.where(weight > 0, weight, 1).to(loss_sum.dtype)
    sent = weight.new_tensor(sum(candidates.sent_bytes for candidates in groups))
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
        # ln N_s + ln N_t - L; 0 / 0 without weight.
        nats_over_chance=(sums.uniform_loss * scale).sum() / weight - mean_loss,
        exchanged_bytes=mean_sent.long(),
    )


def _inputs(tensors: Mapping[str, Sequence[torch.Tensor] | None]) -> list[Inputs]:
    """Split validated tensors by candidate set; labels become int64, and gradients stop where none is wanted."""
    source = tensors["source"]
    assert source is not None
    columns = [x if x is not None else [None] * len(source) for x in tensors.values()]
    candidate_sets = []
    for s, t, labels, truth, classes, weights, guide_source, guide_target in zip(*columns, strict=True):
        assert s is not None
        assert t is not None
        assert labels is not None
        guide = None
        if guide_source is not None and guide_target is not None:
            guide = guide_source.detach(), guide_target.detach()
        truth, classes = (None if x is None else x.long() for x in (truth, classes))
        weights = None if weights is None else weights.detach()
        candidate_sets.append(Inputs(s, t, labels.long(), truth, classes, weights, guide))
    return candidate_sets


def _candidate_group(
    inputs: Inputs, members: list[RankMetadata], process_group: dist.ProcessGroup | None, options: Options
) -> CandidateGroup:
    """Build the group of the given ranks, or of this rank alone if there are none."""
    if not members:
        return CandidateGroup("local", process_group, 0, 1, [len(inputs.source)], [len(inputs.target)])
    if options.exchange in ("gather", "ring"):
        communication = options.exchange
    else:
        communication = _communication(members, options.dtype)
    return CandidateGroup(
        communication,
        process_group,
        dist.get_rank(process_group),
        len(members),
        [rank.source_rows for rank in members],
        [rank.target_rows for rank in members],
        _COMM_DTYPES[options.wire_dtype],
    )


def _communication(members: list[RankMetadata], dtype: Precision) -> Literal["gather", "ring"]:
    """Choose `gather` if the keys of all ranks, in their type, and their gradients in fp32 fit `GATHER_BYTES`."""
    rows = sum(rank.source_rows + rank.target_rows for rank in members)
    needed = rows * members[0].channels * (4 + (2 if dtype == "bf16" else 4))
    return "gather" if needed <= GATHER_BYTES else "ring"


def _fastest(device: torch.device, dtype: Precision) -> Implementation:
    # In fp32 the fused kernels cannot use tensor cores, and the vendor's matmuls are faster.
    if device.type == "cuda" and dtype == "bf16":
        from dist_pca.association.triton_launch import can_run

        if can_run(device):
            return "triton"
    return "blockwise"


@cache
def _log_once(implementation: Implementation, communication: str, ranks: int, dtype: Precision) -> None:
    if world_size() == 1 or dist.get_rank() == 0:
        candidates = f"{communication} over {ranks} ranks" if ranks > 1 else "each rank's own pixels"
        _log.info("association: %s, matmuls in %s, candidates: %s", implementation, dtype, candidates)
