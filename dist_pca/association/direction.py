"""One of the two directions of a cycle: rows that look for their best key, and the keys of the other domain."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dist_pca.association.pool import Keys
from dist_pca.association.side import Side


class Matched(NamedTuple):
    """What matching leaves of each of k query rows; all but the first only where rows come in parts."""

    best: torch.Tensor
    """int64 [k], best key in the pool."""
    value: torch.Tensor | None = None
    """[k], its product with the scaled query."""
    log_sum: torch.Tensor | None = None
    """[k], log-sum-exp over all keys."""
    sigma: torch.Tensor | None = None
    """[k, 1], temperature."""

    def at(self, rows: torch.Tensor) -> "Matched":
        """That of some of the rows."""
        value, log_sum, sigma = (None if field is None else field[rows] for field in self[1:])
        return Matched(self.best[rows], value, log_sum, sigma)


@dataclass(frozen=True)
class Direction:
    """Queries of one domain on this rank against the keys of the other in the pool."""

    queries: Side
    keys: Keys
    key_side: Side
    """The other domain on this rank, where its keys' gradient is added up."""
    triton: bool
    """Fused kernels instead of plain PyTorch."""
    deterministic: bool
    slope: torch.Tensor | None
    """[n], each query row's gradient of its `-log p` with respect to its deviation; None where that is detached."""

    @property
    def key_gradient(self) -> torch.Tensor | None:
        """Where this rank's keys' gradient is added up; None if nobody asks for gradients."""
        return self.key_side.key_gradient if self.key_side.gradients else None


def add_gradient_through_deviation(direction: Direction) -> None:
    """Add what flows through each row's standard deviation, from the slopes that the sweep has left. Collective.

    `var_i = q_i' Cov(k) q_i`, so `d sigma_i = q_i' Cov(k) dq_i / sigma_i` and, for each key,
    `(q_i . k_j) q_i . dk_j / ((m - 1) sigma_i)`: two products with C x C matrices, and no pass over similarities.
    """
    queries, candidates = direction.queries, sum(direction.keys.counts)
    assert direction.slope is not None
    covariance = direction.key_side.covariance()
    moment = torch.zeros_like(covariance)
    rows = direction.slope.nonzero()[:, 0]
    for part in torch.split(rows, 1024):
        query = queries.query(part)
        spread = query @ covariance
        sigma = (spread * query).sum(dim=1, keepdim=True).clamp(min=torch.finfo(query.dtype).tiny).sqrt()
        pull = direction.slope[part, None] / sigma
        queries.add_query_gradient(part, pull * spread)
        moment += query.T @ (pull * query)
    direction.key_side.add_key_gradient_through(direction.keys.pool.sum(moment) / max(1, candidates - 1))
