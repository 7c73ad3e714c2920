"""Validation across ranks, before the first collective of the loss.

A wrong tensor on one rank would leave the others waiting in a collective, or go unnoticed in everyone's loss. So ranks
first exchange the shapes and ranges of their inputs, in one small all-gather, and each judges the whole table.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist

from dist_pca.association.exchange import world_size
from dist_pca.association.options import Options
from dist_pca.association.phases import phase

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
"""Tensors by the name in an error; all but the first three are optional."""
SAME_ON_ALL_RANKS = ("target_classes", "target_weights", "guide source")
"""What all ranks must give or none. True labels serve diagnosis alone, so some ranks may lack them."""
Tensors = Mapping[str, Sequence[torch.Tensor] | None]


class Facts(NamedTuple):
    """One tensor of one rank in numbers, summed up over its pools."""

    given: int
    rows: int
    """-1 where a pool has not the right number of dimensions."""
    channels: int
    """-1 where pools differ, or are no matrices."""
    fits: int
    """Whether there are as many pools as of its domain, each with as many rows."""
    pools: int
    smallest: int
    """Rows of the smallest pool."""
    element_size: int
    """Bytes of a value in the type that it is computed in, fp32 or more; 0 where pools differ."""
    invalid: int
    """Values that are NaN or infinite, or of weights negative."""
    lowest: int
    highest: int


class RankInputs(NamedTuple):
    """One rank's inputs in numbers."""

    settings: int
    gradients: int
    tensors: dict[str, Facts]

    @property
    def source_rows(self) -> int:
        """Source pixels of all pools."""
        return self.tensors["source"].rows

    @property
    def target_rows(self) -> int:
        """Target pixels of all pools."""
        return self.tensors["target"].rows

    @property
    def channels(self) -> int:
        """Channels C of both domains."""
        return self.tensors["source"].channels


def validate(tensors: Tensors, options: Options) -> list[RankInputs]:
    """Inputs of every rank, in rank order. Collective over the world.

    Args:
        tensors: Pools of each of `NAMES`, or None: rows [n, C], or vectors [n].
        options: What must be the same on every rank.

    Raises:
        ValueError: on every rank together, naming each rank and tensor that is wrong.
    """
    facts = [_facts(name, tensors, options.ignore_index) for name in NAMES]
    own = [
        crc32(repr(options).encode()),
        int(_wants_gradients(tensors)),
        *(number for fact in facts for number in fact),
    ]
    ranks = world_size()
    sources = tensors["source"]
    assert sources is not None
    numbers = torch.tensor(own, dtype=torch.int64, device=sources[0].device)
    table = [torch.empty_like(numbers) for _ in range(ranks)]
    if ranks > 1:
        with phase("exchange"):
            dist.all_gather(table, numbers)
    else:
        table = [numbers]
    everyone = [_read(row.tolist()) for row in table]
    wrong = [
        f"rank {rank}: {problem}" if ranks > 1 else problem
        for rank, inputs in enumerate(everyone)
        for problem in _problems(inputs, everyone[0], options)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return everyone


def _read(row: list[int]) -> RankInputs:
    width = len(Facts._fields)
    facts = [Facts(*row[start : start + width]) for start in range(2, len(row), width)]
    return RankInputs(row[0], row[1], dict(zip(NAMES, facts, strict=True)))


def _wants_gradients(tensors: Tensors) -> bool:
    rows = [*(tensors["source"] or ()), *(tensors["target"] or ())]
    return torch.is_grad_enabled() and any(x.requires_grad for x in rows)


def _facts(name: str, tensors: Tensors, ignore_index: int) -> Facts:
    pools, domain = tensors[name], tensors[_domain(name)]
    if pools is None or domain is None:
        return Facts(0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    matrix, classes = _is_matrix(name), name.endswith(("labels", "classes"))
    dimensions = 2 if matrix else 1
    fitting = all(pool.ndim == dimensions for pool in pools)
    channels = {pool.shape[1] if pool.ndim == 2 else -1 for pool in pools}
    sizes = {torch.promote_types(pool.dtype, torch.float32).itemsize for pool in pools}
    lengths, expected = ([len(pool) if pool.ndim else 0 for pool in x] for x in (pools, domain))
    invalid = 0 if classes else sum(_invalid(pool.detach(), weights=not matrix) for pool in pools)
    known = [pool[pool != ignore_index] for pool in pools] if classes else []
    known = [pool for pool in known if len(pool)]
    return Facts(
        given=1,
        rows=sum(lengths) if fitting else -1,
        channels=channels.pop() if matrix and len(channels) == 1 else -1,
        fits=int(fitting and lengths == expected),
        pools=len(pools),
        smallest=min(lengths, default=0),
        element_size=sizes.pop() if len(sizes) == 1 else 0,
        invalid=invalid,
        lowest=min((int(pool.min()) for pool in known), default=0),
        highest=max((int(pool.max()) for pool in known), default=0),
    )


def _invalid(x: torch.Tensor, *, weights: bool) -> int:
    valid = torch.isfinite(x)
    if weights:
        valid &= x >= 0
    return int(x.numel() - valid.sum())


def _problems(inputs: RankInputs, first: RankInputs, options: Options) -> list[str]:
    facts = inputs.tensors
    shown = {name: f"{name} [{fact.rows}, {fact.channels}]" for name, fact in facts.items()}
    problems = []
    if inputs.settings != first.settings or facts["source"].pools != first.tensors["source"].pools:
        problems.append("was called with other arguments than rank 0")
    if inputs.gradients != first.gradients:
        problems.append("wants gradients and rank 0 does not, or the reverse; give all ranks inputs of one kind")
    for name in SAME_ON_ALL_RANKS:
        if facts[name].given != first.tensors[name].given:
            argument, has = name.split()[0], "has" if facts[name].given else "lacks"
            problems.append(f"{has} {argument}, unlike rank 0; give it on all ranks or on none")
    problems += _shape_problems(facts, first.tensors, shown, options)
    for name, fact in facts.items():
        if fact.invalid > 0:
            kind = "NaN or infinite" if _is_matrix(name) else "negative, NaN or infinite"
            problems.append(f"{name} has {fact.invalid} values that are {kind}")
        if fact.lowest < 0 or fact.highest >= options.num_classes:
            problems.append(
                f"{name} range from {fact.lowest} to {fact.highest}; they must be 0 to {options.num_classes - 1}, "
                f"or {options.ignore_index}"
            )
    return problems


def _shape_problems(
    facts: dict[str, Facts], first: dict[str, Facts], shown: dict[str, str], options: Options
) -> list[str]:
    problems = []
    source, target, guide, guide_target = (facts[name] for name in NAMES if _is_matrix(name))
    if min(*source[1:3], *target[1:3]) < 0 or source.channels != target.channels:
        problems.append(f"{shown['source']} and {shown['target']} must be [n, C] with the same C")
    elif source.channels != first["source"].channels:
        problems.append(f"{shown['source']} has other channels than rank 0, which has {first['source'].channels}")
    elif min(source.smallest, target.smallest) == 0:
        problems.append(
            f"{shown['source']} or {shown['target']} has a pool without positions; "
            "every rank needs some of both domains"
        )
    if guide.given:
        if min(guide.rows, guide_target.rows) < 0 or guide.channels != guide_target.channels or guide.channels < 0:
            problems.append(f"{shown['guide source']} and {shown['guide target']} must be [n, C'] with the same C'")
        elif first["guide source"].given and guide.channels != first["guide source"].channels:
            channels = first["guide source"].channels
            problems.append(f"{shown['guide source']} has other channels than rank 0, which has {channels}")
        if options.guide_keys and guide.channels != source.channels:
            problems.append(
                f"{shown['guide source']} must have the {source.channels} channels of source to serve as keys; "
                "give guide_keys=False"
            )
    elif options.guide_keys:
        problems.append("guide_keys needs a guide")
    for name in NAMES[2:]:
        fact, domain = facts[name], _domain(name)
        expected = facts[domain].rows
        if fact.fits or (_is_matrix(name) and fact.rows < 0):
            continue
        if fact.rows != expected:
            given, wanted = (f"{rows}, {fact.channels}" if _is_matrix(name) else rows for rows in (fact.rows, expected))
            problems.append(f"{name} [{given}] must be [{wanted}], one for each {domain} row")
        else:
            problems.append(f"{name} must have as many rows as {domain} in every pool")
    sizes = source.element_size, target.element_size
    if 0 in sizes or {*sizes} != {first["source"].element_size}:
        problems.append(f"{shown['source']} and {shown['target']} must both be fp64, or neither, as on rank 0")
    if source.pools != target.pools:
        problems.append(f"source has {source.pools} pools and target {target.pools}; they must be as many")
    return problems


def _is_matrix(name: str) -> bool:
    return name.endswith(("source", "target"))


def _domain(name: str) -> str:
    return "source" if name in ("source", "labels", "guide source") else "target"
