"""What the association of one level takes of one rank: bytes sent, memory and operations.

The formulas follow the buffers and collectives of `dist_pca.association`, pixel by pixel.
"""

from dataclasses import dataclass
from typing import Literal

from dist_pca.association.loss import GATHER_BYTES
from dist_pca.association.tiles import CPU_TILE_BYTES, GPU_TILE_BYTES, MIN_ROWS
from dist_pca.association.triton_launch import KERNEL_ROWS
from dist_pca.config import AssociationConfig, Level
from dist_pca.tools.planning.hardware import Assumptions
from dist_pca.tools.planning.term import Term, all_reduce

_DENSE_MATRICES = 6
"""Matrices of all pixels against all that dense autograd holds at its peak; three of them until backward."""


@dataclass(frozen=True)
class Candidates:
    """Pixels of one level on one rank and on all that are candidates for each other."""

    source: int
    """Source pixels on this rank."""
    target: int
    """Target pixels on this rank."""
    channels: int
    classes: int
    ranks: int
    """Ranks whose pixels form the candidate set; 1 where it is local."""
    sets: int
    """Candidate sets on this rank, one after the other: pairs of images under scope `pair`, else 1."""


def communication(config: AssociationConfig, candidates: Candidates) -> Literal["local", "gather", "ring"]:
    """How ranks see each other's keys."""
    if candidates.ranks == 1:
        return "local"
    if config.implementation == "reference":
        return "gather"
    if config.communication != "auto":
        return config.communication
    rows = candidates.ranks * (candidates.source + candidates.target)
    return "gather" if rows * candidates.channels * (4 + _product_bytes(config)) <= GATHER_BYTES else "ring"


def implementation(config: AssociationConfig, device: str) -> Literal["reference", "blockwise", "triton"]:
    """How it is computed, as `cycle_association` chooses."""
    if config.implementation != "auto":
        return config.implementation
    return "triton" if device != "cpu" and config.dtype == "bf16" else "blockwise"


def sent_bytes(config: AssociationConfig, candidates: Candidates, device: str) -> float:
    """Bytes of keys, matches, statistics and gradients that a rank sends to others, as `communication_bytes` counts."""
    ranks, others = candidates.ranks, candidates.ranks - 1
    if ranks == 1:
        return 0.0
    rows, labels = candidates.source + candidates.target, 8 * others * candidates.source
    if config.implementation == "reference":
        return 2 * others * rows * candidates.channels * 4 + 2 * labels + others * candidates.source
    split = communication(config, candidates) == "ring" or implementation(config, device) == "triton"
    vector, matrix = (all_reduce(4 * candidates.channels**power, ranks) for power in (1, 2))
    keys = others * rows * candidates.channels * _comm_bytes(config)
    sent = 2 * vector + 2 * labels + 8 * others * candidates.target
    if split:
        sent += 2 * matrix
    if not config.detach_statistics:
        sent += 4 * matrix
    if config.teacher_matches and not config.teacher_keys:
        # The teacher's keys are shared to match, and the student's to contrast.
        sent += 2 * vector + keys
    if communication(config, candidates) == "ring":
        # Keys are sent around the ring once to match and once with their gradients, which take one more step to reach
        # their owner. A teacher's keys have no gradient, but are sent once more for the softmax, since other features
        # chose the matches.
        return sent + (3 * keys if config.teacher_keys else 2 * keys + ranks * rows * candidates.channels * 4)
    gradient_bytes = 0 if config.teacher_keys else 2 if config.comm_dtype == "bf16" else 4
    return sent + keys + others * rows * candidates.channels * gradient_bytes


def memory(config: AssociationConfig, level: Level, candidates: Candidates, device: str) -> Term:
    """Bytes beyond the rows that are given in and the gradients that come out."""
    source, target = candidates.source // candidates.sets, candidates.target // candidates.sets
    channels, ranks = candidates.channels, candidates.ranks
    rows, largest = source + target, max(source, target)
    saved = 4 * candidates.channels * (candidates.source + candidates.target)
    if implementation(config, device) == "reference":
        matrix = 4 * source * target * ranks
        return Term(3 * matrix * candidates.sets, (_DENSE_MATRICES + 3 * (candidates.sets - 1)) * matrix, 4 * matrix)
    product, wire = _product_bytes(config), _comm_bytes(config)
    kind, triton = communication(config, candidates), implementation(config, device) == "triton"
    as_given = kind == "local" and level == "features" and product == 4 and not triton
    gradients = 4 * rows * channels * (1 if level == "features" else 2)
    own_keys = 0 if as_given else 4 * rows * channels
    numbers = 8 * ranks * (4 * source + 2 * target) + 16 * target * (candidates.classes + 1)
    tile, copies = _tile_bytes(largest, largest * (1 if kind == "ring" else ranks), channels, device, triton)
    if kind == "gather":
        held = product * ranks * rows * channels + (own_keys if level == "predictions" else 0)
        # While the second side's keys are gathered, they are there in parts and as a whole.
        sharing = held + 2 * wire * ranks * largest * channels + own_keys // 2
        sweeping = held + 4 * ranks * largest * channels + max(tile + copies, 4 * ranks * largest * channels)
    elif kind == "ring":
        held = wire * rows * channels + (own_keys if level == "predictions" else 0)
        sharing = held + own_keys
        block = largest * channels
        matching = 2 * tile + (2 * wire + product) * block
        sweeping = held + copies + max(matching, tile + (2 * wire + product + 12) * block)
    else:
        held = own_keys + (0 if product == 4 else product * rows * channels)
        # Rows whose cycle is kept are taken out of a tile that is still there.
        sharing, sweeping = held, held + 2 * tile + copies
    finishing = 4 * 2 * largest * channels if level == "predictions" else 0
    peak = gradients + numbers + max(sharing, sweeping, held + finishing)
    return Term(saved, peak + saved * (candidates.sets - 1) // candidates.sets, saved)


def flops(config: AssociationConfig, candidates: Candidates, assumptions: Assumptions, device: str) -> float:
    """Operations of the matrix products, value and gradients."""
    ranks, sets = candidates.ranks, candidates.sets
    per_set = 2 * candidates.channels * (candidates.source // sets) * (candidates.target // sets) * ranks
    one = float(per_set * sets)
    if config.implementation == "reference":
        return 6 * one
    # Backward: to match, and again with both gradients. Forward: to match; for kept ones both gradients, and unless the
    # whole candidate set is here the product again.
    again = 1 if communication(config, candidates) != "local" or implementation(config, device) == "triton" else 0
    found = one * (1 + (2 + again) * assumptions.kept + 4 * assumptions.matched)
    if config.teacher_matches:
        # Products of the teacher's pixels choose the matches; those of the student's are taken beside them.
        found += one * ((1 - again) * assumptions.kept + assumptions.matched)
    if config.teacher_keys:
        found -= one * (assumptions.kept + assumptions.matched)
    return found


def _tile_bytes(rows: int, columns: int, channels: int, device: str, triton: bool) -> tuple[int, int]:
    """Bytes of a tile of logits, and of the copies of queries that are made for it."""
    if triton:
        # The kernels keep no tile.
        return 0, min(rows, KERNEL_ROWS) * channels * 14
    budget = CPU_TILE_BYTES if device == "cpu" else GPU_TILE_BYTES
    height = min(rows, max(MIN_ROWS, budget // (4 * columns)))
    return 4 * height * columns, 2 * 4 * height * channels


def _product_bytes(config: AssociationConfig) -> int:
    return 2 if config.dtype == "bf16" else 4


def _comm_bytes(config: AssociationConfig) -> int:
    return 2 if "bf16" in (config.dtype, config.comm_dtype) else 4
