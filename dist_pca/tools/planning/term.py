"""What terms of the objective are counted in."""

from typing import NamedTuple


class Term(NamedTuple):
    """Bytes that one term of the objective adds to what is alive."""

    saved: float
    """From its forward to its backward pass."""
    forward: float
    """At its forward pass's peak, what it saves included."""
    backward: float
    """At its backward pass's peak, what it saved included."""


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that each rank sends so that all have the sum of `size` bytes: round a ring in parts, and once more."""
    return 2 * (ranks - 1) / ranks * size


def all_gather(own: float, ranks: int) -> float:
    """Bytes that each rank sends so that all have everyone's `own` bytes."""
    return (ranks - 1) * own


def reduce_scatter(size: float, ranks: int) -> float:
    """Bytes that each rank sends so that each has its share of the sum of `size` bytes."""
    return (ranks - 1) / ranks * size
