"""Cycle association loss as a function and as a module: validate, find cycles, contrast, reduce."""

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, wraps
from typing import Any, TypeVar, cast, get_args, get_type_hints

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import Unpack

from dist_pca.association import method, streamed
from dist_pca.association.candidates import CandidateGroup, phase
from dist_pca.association.options import (
    Implementation,
    Inputs,
    LossKeywords,
    Options,
    PairKeywords,
    Precision,
)
from dist_pca.association.result import Association, correct_ratio, count, total
from dist_pca.association.validate import NAMES, Tensors, validate
from dist_pca.distributed import all_gather, all_reduce_sum, is_rank0, world_size

GATHER_BYTES = 4 << 30
"""Memory up to which `auto` gathers the keys of all ranks and their gradients [bytes per rank]; beyond it, `ring`."""
_log = logging.getLogger("dist_pca.association")
_OLD_NAMES = {"exchange": "communication", "wire_dtype": "comm_dtype"}
F = TypeVar("F", bound=Callable[..., Any])


def spelled_out(function: F) -> F:
    """Let `help` list the keyword arguments of `**options` one by one, and calls use their old names too."""

    @wraps(function)
    def renaming(*arguments: Any, **options: Any) -> Any:
        for old, new in _OLD_NAMES.items():
            if old in options and new not in options:
                warnings.warn(f"{old} is now {new}; the old name works until 0.3", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
        return function(*arguments, **options)

    signature = inspect.signature(function)
    *parameters, options = signature.parameters.values()
    (keywords,) = get_args(options.annotation)
    annotations = get_type_hints(keywords)
    for option in fields(Options):
        if option.name in annotations:
            parameters.append(
                inspect.Parameter(
                    option.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=option.default,
                    annotation=annotations[option.name],
                )
            )
    renaming.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return cast("F", renaming)


@spelled_out
def cycle_association(
    source: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    target_labels: torch.Tensor | None = None,
    target_classes: torch.Tensor | None = None,
    target_weights: torch.Tensor | None = None,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[LossKeywords],
) -> Association:
    """Compute the cycle association loss of this rank's source and target pixels (PLCA, section 3.1).

    Matches and softmax denominators run over the pixels of all ranks of the group, or with `communication="local"` over
    this rank's alone. Either way the mean is over the kept cycles of all ranks of the world, and the gradient that
    DDP or ZeRO averages over ranks is that of one process on the concatenated batch.

    Collective: all ranks of the world must call it, with any number of pixels from 1, and all or none of them with each
    optional input except `target_labels`. All communication happens in this call and none in the backward pass; all
    ranks must scale the loss alike.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] features, or class probabilities for `kl`.
        labels: [n_s] integer labels of the source pixels.
        num_classes: Number of classes; labels are below it.
        target_labels: [n_t] integer labels, used for diagnostics only.
        target_classes: [n_t] integer classes predicted by a teacher at the target pixels, `ignore_index` where it is
            unsure. A consistent cycle is then kept only if the class at its matched target equals the source label too.
        target_weights: [n_t] teacher confidences, 0 or more: the weight of every cycle through each target pixel.
        guide: [n_s, C'] and [n_t, C'] features or probabilities without gradient, such as a teacher's, that choose the
            matches of both directions in place of `source` and `target`.
        group: Ranks whose pixels are candidates for each other; None is the world.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        ignore_index: Label of pixels that neither start nor end a cycle.
        detach_statistics: Stop the gradient through each row's mean and standard deviation.
        class_balanced: Average within each class, then over the classes that have a kept cycle of positive weight on
            any rank.
        class_weights: Weight of each class in the class-balanced mean, `num_classes` numbers of 0 or more; or
            `kept_share`, the share of its labelled source pixels whose cycle is kept, each cycle counted by its weight.
            None weighs all classes alike.
        guide_keys: Use the guide as the keys of both softmaxes too, so that gradients flow into queries alone, as in
            momentum contrast (MoCo, He et al., CVPR 2020); C' must be C.
        communication: `gather` stores all ranks' keys on every rank; `ring` sends them from rank to rank, so that
            memory does not grow with the ranks; `auto` gathers up to `GATHER_BYTES`; `local` uses this rank's pixels
            alone.
        implementation: `reference` (dense; gathers), `blockwise` (PyTorch tiles), `online_softmax` (the same, with
            softmaxes accumulated block by block even where all keys are local), `triton` (fused, on GPUs), or `auto`
            for the fastest available.
        dtype: Type of matmul operands in all but `reference`; accumulation is in fp32, or fp64 for fp64 inputs.
        comm_dtype: Type of keys sent between ranks; with `dtype="bf16"` they are sent in bf16 in any case.
        deterministic: Give the same bits on every run, on a GPU too.

    Raises:
        ValueError: on all ranks together, if on any of them shapes do not fit, values are not finite, weights are
            negative, labels are out of range, there are no pixels, or an optional input is missing; ranks and tensors
            are named. Or `triton` cannot run on this device.
    """
    tensors = (source, target, labels, target_labels, target_classes, target_weights, *(guide or (None, None)))
    return _solve([None if x is None else [x] for x in tensors], group, Options(num_classes=num_classes, **options))


@spelled_out
def cycle_association_pairs(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    *,
    num_classes: int,
    target_labels: Sequence[torch.Tensor] | None = None,
    target_classes: Sequence[torch.Tensor] | None = None,
    target_weights: Sequence[torch.Tensor] | None = None,
    guide: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None,
    **options: Unpack[PairKeywords],
) -> Association:
    """Compute the cycle association loss image pair by image pair, as in the paper (PLCA, section 3.1).

    Every tensor argument of `cycle_association` is a list here, with one entry for each pair; the guide is a list of
    source features and one of target features. Matches and softmaxes stay within a pair; the mean is over the kept
    cycles of all pairs and ranks together. Collective over the world; raises what `cycle_association` raises.
    """
    tensors = (sources, targets, labels, target_labels, target_classes, target_weights, *(guide or (None, None)))
    # A pair is on one rank, so there is no communication to choose.
    return _solve(tensors, None, Options(num_classes=num_classes, communication="local", comm_dtype="fp32", **options))


associate = cycle_association
"""Alias of `cycle_association`."""
associate_pairs = cycle_association_pairs
"""Alias of `cycle_association_pairs`."""


class CycleAssociationLoss(nn.Module):
    """Cycle association loss (PLCA, section 3.1) with its options fixed at construction.

    The module has no parameters and no state. Every option is documented at `cycle_association`.

    Example:
        >>> criterion = CycleAssociationLoss(num_classes=19)
        >>> association = criterion(source, target, labels)  # [n_s, C], [n_t, C], [n_s]
        >>> association.loss.backward()
    """

    @spelled_out
    def __init__(
        self, num_classes: int, *, group: dist.ProcessGroup | None = None, **options: Unpack[LossKeywords]
    ) -> None:
        super().__init__()
        self.group = group
        self.options = Options(num_classes=num_classes, **options)

    def forward(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        labels: torch.Tensor,
        *,
        target_labels: torch.Tensor | None = None,
        target_classes: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Association:
        """Compute loss and diagnostics of this rank's pixels. Collective over the world.

        Args:
            source: [n_s, C] features, or class probabilities for `kl`.
            target: [n_t, C] features, or class probabilities for `kl`.
            labels: [n_s] integer labels of the source pixels.
            target_labels: [n_t] integer labels, used for diagnostics only.
            target_classes: [n_t] integer classes predicted by a teacher, `ignore_index` where it is unsure.
            target_weights: [n_t] teacher confidences, 0 or more.
            guide: [n_s, C'] and [n_t, C'] features or probabilities that choose the matches.

        Raises:
            ValueError: as `cycle_association` does.
        """
        tensors = (source, target, labels, target_labels, target_classes, target_weights, *(guide or (None, None)))
        return _solve([None if x is None else [x] for x in tensors], self.group, self.options)

    def extra_repr(self) -> str:
        """Format the options for `print(module)`."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


def _solve(
    columns: Sequence[Sequence[torch.Tensor] | None], process_group: dist.ProcessGroup | None, options: Options
) -> Association:
    """Compute the loss and its diagnostics. Collective over the world.

    Args:
        columns: Inputs in the order of `NAMES`, one tensor for each candidate set of this rank; None if not given.
        process_group: Ranks whose pixels are candidates for each other; None is the world.
        options: Equal on all ranks.

    Raises:
        ValueError: on every rank together, naming each rank and tensor that is wrong.
    """
    tensors = dict(zip(NAMES, columns, strict=True))
    validated = validate(tensors, options)
    candidate_sets = _inputs(tensors)
    device = candidate_sets[0].source.device
    local = options.communication == "local" or world_size(process_group) == 1
    if options.implementation == "auto":
        options = replace(options, implementation=_fastest(device, options.dtype))
    groups = [
        CandidateGroup("local", process_group, 0, 1, [len(inputs.source)], [len(inputs.target)])
        if local
        else _candidate_group(inputs, validated.channels, process_group, options)
        for inputs in candidate_sets
    ]
    _log_once(options.implementation, groups[0].communication, groups[0].ranks, options.dtype)
    find_cycles = method.find_cycles if options.implementation == "reference" else streamed.find_cycles

    loss_sum = torch.zeros((), device=device)
    counts, contrasts = [], []
    # Autocast would compute similarities in half precision, and with them argmax and standard deviation.
    with torch.autocast(device.type, enabled=False):
        for inputs, candidates in zip(candidate_sets, groups, strict=True):
            cycles = find_cycles(inputs, candidates, options)
            counts.append(count(inputs, cycles, candidates, options, confusion=validated.target_labels))
            if options.class_balanced:
                # Their scale is not known before all candidate sets are counted.
                contrasts.append(cycles.contrast)
            else:
                loss_sum = loss_sum + cycles.contrast(None)
            # Free its memory before the next candidate set allocates as much.
            del cycles
        with phase("communication"):
            sums = total(counts)
        kept_share = sums.weight / sums.labelled.clamp(min=1)
        # Class scales s_c = 1, or r_c / (sum of w_i over class c) with the weight r_c of the class.
        scale = torch.ones_like(sums.weight)
        if options.class_balanced:
            scale = torch.where(sums.weight > 0, _class_weights(options, kept_share) / sums.weight, 0)
        while contrasts:
            loss_sum = loss_sum + contrasts.pop(0)(scale)

    # L = sum_i w_i s_y(i) l_i / sum_i w_i s_y(i), times the world size because ranks' gradients are averaged.
    weight, kept = (sums.weight * scale).sum(), sums.kept.sum()
    loss = world_size() * loss_sum / torch.where(weight > 0, weight, 1).to(loss_sum.dtype)
    sent = weight.new_tensor(sum(candidates.sent_bytes for candidates in groups))
    with phase("communication"):
        mean_loss, mean_sent = all_reduce_sum(torch.stack([loss.detach().double(), sent])) / world_size()
    matrices = sums.confusion if validated.target_labels else sums.confusion.new_zeros((2, *sums.confusion.shape[1:]))
    return Association(
        loss=loss,
        kept=kept.long(),
        cover_ratio=sums.covered / sums.targets,
        consistent_ratio=sums.consistent / sums.labelled.sum().clamp(min=1),
        kept_ratio=kept / sums.labelled.sum().clamp(min=1),
        correct_ratio=correct_ratio(matrices[0]),
        kept_correct_ratio=correct_ratio(matrices[1]),
        kept_per_class=sums.kept.long(),
        kept_share=kept_share,
        confusion=matrices[0].long(),
        kept_confusion=matrices[1].long(),
        # ln N_s + ln N_t - L; 0 / 0 without weight.
        mutual_information_bound=(sums.uniform_loss * scale).sum() / weight - mean_loss,
        communication_bytes=mean_sent.long(),
    )


def _class_weights(options: Options, kept_share: torch.Tensor) -> torch.Tensor:
    """Weight r_c of each class in the class-balanced mean, fp64 [K]."""
    if options.class_weights is None:
        return torch.ones_like(kept_share)
    return kept_share if options.class_weights == "kept_share" else kept_share.new_tensor(options.class_weights)


def _inputs(tensors: Tensors) -> list[Inputs]:
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
    inputs: Inputs, channels: int, process_group: dist.ProcessGroup | None, options: Options
) -> CandidateGroup:
    """Build the group of the ranks whose pixels are candidates for each other. Collective over them."""
    own = torch.tensor([len(inputs.source), len(inputs.target)], device=inputs.source.device)
    with phase("communication"):
        source_counts, target_counts = all_gather(own[None], process_group).T.tolist()
    communication = options.communication
    if communication not in ("gather", "ring"):
        # All ranks' keys in their type, and their gradients in fp32.
        needed = sum(source_counts + target_counts) * channels * (4 + (2 if options.dtype == "bf16" else 4))
        communication = "gather" if needed <= GATHER_BYTES else "ring"
    return CandidateGroup(
        communication,
        process_group,
        dist.get_rank(process_group),
        len(source_counts),
        source_counts,
        target_counts,
        torch.bfloat16 if options.comm_dtype == "bf16" else None,
    )


def _fastest(device: torch.device, dtype: Precision) -> Implementation:
    # In fp32 the fused kernels cannot use tensor cores, and the vendor's matmuls are faster.
    if device.type == "cuda" and dtype == "bf16":
        from dist_pca.association.triton_launch import can_run

        if can_run(device):
            return "triton"
    return "blockwise"


@cache
def _log_once(implementation: Implementation, communication: str, ranks: int, dtype: Precision) -> None:
    if is_rank0():
        candidates = f"{communication} over {ranks} ranks" if ranks > 1 else "each rank's own pixels"
        _log.info("association: %s, matmuls in %s, candidates: %s", implementation, dtype, candidates)
