"""Input validation across ranks, before the first collective of the loss.

A wrong tensor on one rank would leave the others waiting in a collective, or go unnoticed in the loss of all. So each
rank first validates its own inputs, and one maximum over ranks, of constant size, finds whether any is wrong or unlike
the others'. Only then are the shapes and ranges of all ranks' inputs gathered, for the message.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist

from dist_pca.association.candidates import phase
from dist_pca.association.options import Options
from dist_pca.distributed import world_size

NAMES = (
    "source",
    "target",
    "labels",
    "target_labels",
    "target_classes",
    "target_weights",
    "guide source",
    "guide target",
)
"""Inputs as error messages name them; all but the first three are optional."""
SAME_ON_ALL_RANKS = ("target_classes", "target_weights", "guide source")
"""Optional inputs that all ranks must give, or none. Target labels are for diagnostics, so some ranks may lack them."""
Tensors = Mapping[str, Sequence[torch.Tensor] | None]
"""One tensor for each candidate set of this rank by name, or None if it is not given."""


class TensorMetadata(NamedTuple):
    """One input of one rank as integers, over all its candidate sets."""

    given: int
    """Whether the input is given."""
    rows: int
    """Rows in total; -1 where a tensor has a wrong number of dimensions."""
    channels: int
    """Channels; -1 where tensors differ, or are no matrices."""
    fits: int
    """Whether there are as many tensors as of its domain's features, each with as many rows."""
    tensors: int
    """Candidate sets."""
    smallest: int
    """Rows of the smallest tensor."""
    element_size: int
    """Size of an element in the type it is computed in, fp32 or fp64 [bytes]; 0 where tensors differ."""
    invalid: int
    """Elements that are NaN or infinite, or negative weights."""
    lowest: int
    """Lowest label that is not ignored; 0 if there is none."""
    highest: int
    """Highest label that is not ignored; 0 if there is none."""


class RankMetadata(NamedTuple):
    """Inputs of one rank as integers."""

    options: int
    """Checksum of the options."""
    gradients: int
    """Whether gradients are wanted."""
    tensors: dict[str, TensorMetadata]
    """Inputs by name."""


class Validated(NamedTuple):
    """What is known of all ranks' inputs once they are valid."""

    channels: int
    """Channels C of both domains."""
    target_labels: bool
    """Whether any rank has target labels."""


def validate(tensors: Tensors, options: Options) -> Validated:
    """Validate the inputs of all ranks. Collective over the world.

    Args:
        tensors: Inputs by the names of `NAMES`: pixels [n, C], or vectors [n].
        options: Options of the loss, which must be equal on all ranks.

    Raises:
        ValueError: on every rank together, naming each rank and tensor that is wrong.
    """
    sources, targets = tensors["source"], tensors["target"]
    assert sources is not None
    assert targets is not None
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (*sources, *targets))
    metadata = [_metadata(name, tensors, options.ignore_index) for name in NAMES]
    numbers = [crc32(repr(options).encode()), int(gradients), *(number for tensor in metadata for number in tensor)]
    own, row = _rank_metadata(numbers), torch.tensor(numbers, dtype=torch.int64, device=sources[0].device)
    problems, labelled = _problems(own, own, options), own.tensors["target_labels"].given
    if world_size() > 1:
        shared = _equal_on_all_ranks(own)
        # The least of a number is minus the largest of its negative.
        largest = row.new_tensor([*shared, *(-number for number in shared), bool(problems), labelled])
        with phase("communication"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        *both, any_problem, labelled = largest.tolist()
        if any_problem or any(
            most != -least for most, least in zip(both[: len(shared)], both[len(shared) :], strict=True)
        ):
            problems = _problems_of_all_ranks(row, options)
    if problems:
        raise ValueError("; ".join(problems))
    return Validated(own.tensors["source"].channels, bool(labelled))


def _equal_on_all_ranks(inputs: RankMetadata) -> list[int]:
    """Numbers by which `_problems` compares a rank with rank 0."""
    source, guide = (inputs.tensors[name] for name in ("source", "guide source"))
    given = [inputs.tensors[name].given for name in SAME_ON_ALL_RANKS]
    sizes = [source.tensors, source.channels, source.element_size, guide.channels]
    return [inputs.options, inputs.gradients, *given, *sizes]


def _problems_of_all_ranks(row: torch.Tensor, options: Options) -> list[str]:
    table = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(table, row)
    all_ranks = [_rank_metadata(numbers.tolist()) for numbers in table]
    return [
        f"rank {rank}: {problem}"
        for rank, inputs in enumerate(all_ranks)
        for problem in _problems(inputs, all_ranks[0], options)
    ]


def _rank_metadata(row: list[int]) -> RankMetadata:
    width = len(TensorMetadata._fields)
    tensors = [TensorMetadata(*row[start : start + width]) for start in range(2, len(row), width)]
    return RankMetadata(row[0], row[1], dict(zip(NAMES, tensors, strict=True)))


def _metadata(name: str, tensors: Tensors, ignore_index: int) -> TensorMetadata:
    given, features = tensors[name], tensors[_domain(name)]
    if given is None or features is None:
        return TensorMetadata(0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    matrix, classes = _is_matrix(name), name.endswith(("labels", "classes"))
    dimensions = 2 if matrix else 1
    fitting = all(x.ndim == dimensions for x in given)
    channels = {x.shape[1] if x.ndim == 2 else -1 for x in given}
    sizes = {torch.promote_types(x.dtype, torch.float32).itemsize for x in given}
    lengths, expected = ([len(x) if x.ndim else 0 for x in column] for column in (given, features))
    invalid = 0 if classes else sum(_invalid(x.detach(), weights=not matrix) for x in given)
    known = [x[x != ignore_index] for x in given] if classes else []
    known = [x for x in known if len(x)]
    return TensorMetadata(
        given=1,
        rows=sum(lengths) if fitting else -1,
        channels=channels.pop() if matrix and len(channels) == 1 else -1,
        fits=int(fitting and lengths == expected),
        tensors=len(given),
        smallest=min(lengths, default=0),
        element_size=sizes.pop() if len(sizes) == 1 else 0,
        invalid=invalid,
        lowest=min((int(x.min()) for x in known), default=0),
        highest=max((int(x.max()) for x in known), default=0),
    )


def _invalid(x: torch.Tensor, *, weights: bool) -> int:
    """Count elements that are NaN or infinite, or negative where they are weights."""
    valid = torch.isfinite(x)
    if weights:
        valid &= x >= 0
    return int(x.numel() - valid.sum())


def _problems(inputs: RankMetadata, first: RankMetadata, options: Options) -> list[str]:
    """Describe what is wrong with the inputs of one rank, by itself or unlike those of rank 0."""
    tensors = inputs.tensors
    shapes = {name: f"{name} [{x.rows}, {x.channels}]" for name, x in tensors.items()}
    problems = []
    if inputs.options != first.options or tensors["source"].tensors != first.tensors["source"].tensors:
        problems.append("was called with other arguments than rank 0")
    if inputs.gradients != first.gradients:
        problems.append("wants gradients and rank 0 does not, or the reverse; give all ranks inputs of one kind")
    for name in SAME_ON_ALL_RANKS:
        if tensors[name].given != first.tensors[name].given:
            argument, has = name.split()[0], "has" if tensors[name].given else "lacks"
            problems.append(f"{has} {argument}, unlike rank 0; give it on all ranks or on none")
    problems += _class_weight_problems(options)
    problems += _shape_problems(tensors, first.tensors, shapes, options)
    for name, x in tensors.items():
        if x.invalid > 0:
            kind = "NaN or infinite" if _is_matrix(name) else "negative, NaN or infinite"
            problems.append(f"{name} has {x.invalid} values that are {kind}")
        if x.lowest < 0 or x.highest >= options.num_classes:
            problems.append(
                f"{name} range from {x.lowest} to {x.highest}; they must be 0 to {options.num_classes - 1}, "
                f"or {options.ignore_index}"
            )
    return problems


def _class_weight_problems(options: Options) -> list[str]:
    weights = options.class_weights
    if weights is None:
        return []
    if not options.class_balanced:
        return ["class_weights needs class_balanced"]
    if weights != "kept_share" and (
        len(weights) != options.num_classes or not all(0 <= weight < math.inf for weight in weights)
    ):
        return [f"class_weights must be {options.num_classes} finite numbers of 0 or more"]
    return []


def _shape_problems(
    tensors: dict[str, TensorMetadata], first: dict[str, TensorMetadata], shapes: dict[str, str], options: Options
) -> list[str]:
    """Describe what is wrong with the shapes of one rank's inputs."""
    problems = []
    source, target, guide, guide_target = (tensors[name] for name in NAMES if _is_matrix(name))
    if min(*source[1:3], *target[1:3]) < 0 or source.channels != target.channels:
        problems.append(f"{shapes['source']} and {shapes['target']} must be [n, C] with the same C")
    elif source.channels != first["source"].channels:
        problems.append(f"{shapes['source']} has other channels than rank 0, which has {first['source'].channels}")
    elif min(source.smallest, target.smallest) == 0:
        problems.append(
            f"{shapes['source']} or {shapes['target']} has a candidate set without pixels; "
            "every rank needs pixels of both domains"
        )
    if guide.given:
        if min(guide.rows, guide_target.rows) < 0 or guide.channels != guide_target.channels or guide.channels < 0:
            problems.append(f"{shapes['guide source']} and {shapes['guide target']} must be [n, C'] with the same C'")
        elif first["guide source"].given and guide.channels != first["guide source"].channels:
            channels = first["guide source"].channels
            problems.append(f"{shapes['guide source']} has other channels than rank 0, which has {channels}")
        if options.guide_keys and guide.channels != source.channels:
            problems.append(
                f"{shapes['guide source']} must have the {source.channels} channels of source to serve as keys; "
                "give guide_keys=False"
            )
    elif options.guide_keys:
        problems.append("guide_keys needs a guide")
    for name in NAMES[2:]:
        x, domain = tensors[name], _domain(name)
        expected = tensors[domain].rows
        if x.fits or (_is_matrix(name) and x.rows < 0):
            continue
        if x.rows != expected:
            given, wanted = (f"{rows}, {x.channels}" if _is_matrix(name) else rows for rows in (x.rows, expected))
            problems.append(f"{name} [{given}] must be [{wanted}], one for each {domain} row")
        else:
            problems.append(f"{name} must have as many rows as {domain} in every pair")
    sizes = source.element_size, target.element_size
    if 0 in sizes or {*sizes} != {first["source"].element_size}:
        problems.append(f"{shapes['source']} and {shapes['target']} must both be fp64, or neither, as on rank 0")
    if source.tensors != target.tensors:
        problems.append(f"source has {source.tensors} images and target {target.tensors}; they must be as many")
    return problems


def _is_matrix(name: str) -> bool:
    return name.endswith(("source", "target"))


def _domain(name: str) -> str:
    return "source" if name in ("source", "labels", "guide source") else "target"
