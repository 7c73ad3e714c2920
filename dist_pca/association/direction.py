"""One of the two directions of a cycle: queries of one domain, and the candidates of the other."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dist_pca.association.options import Options
from dist_pca.association.pixels import Pixels
from dist_pca.association.pool import Keys


class Matched(NamedTuple):
    """Matches of k query rows; the softmax's sums where a pass over split rows has taken them."""

    best: torch.Tensor
    """int64 [k], best key in the pool."""
    value: torch.Tensor | None = None
    """[k], its product with the scaled query."""
    log_sum: torch.Tensor | None = None
    """[k], log-sum-exp over all keys."""
    sigma: torch.Tensor | None = None
    """[k, 1], temperature."""

    def at(self, rows: torch.Tensor) -> "Matched":
        """Select rows."""
        value, log_sum, sigma = (None if field is None else field[rows] for field in self[1:])
        return Matched(self.best[rows], value, log_sum, sigma)


@dataclass(frozen=True)
class Direction:
    """Queries of one domain on this rank against the keys of the other in the pool."""

    queries: Pixels
    candidates: Pixels
    """The other domain on this rank, which has shared its keys and accumulates their gradient."""
    options: Options
    softmax: bool
    """Whether its rows go through a softmax; those of a guide that is no key are matched alone."""
    d_sigma: torch.Tensor | None
    """[n], gradient of each query row's `-log p` with respect to its deviation; None where that is detached."""

    @property
    def keys(self) -> Keys:
        """Keys of the candidates in the pool."""
        assert self.candidates.keys is not None
        return self.candidates.keys

    @property
    def key_gradient(self) -> torch.Tensor | None:
        """Where this rank's keys' gradient is accumulated; None if they have none."""
        return self.candidates.key_gradient

    @property
    def triton(self) -> bool:
        """Fused kernels instead of plain PyTorch."""
        return self.options.implementation == "triton"


def directions(
    queries: tuple[Pixels, Pixels], candidates: tuple[Pixels, Pixels], options: Options, *, softmax: bool
) -> tuple[Direction, Direction]:
    """Build the passes source → target and target → source; candidates share keys they have not shared. Collective.

    Args:
        queries: Source and target pixels on this rank.
        candidates: Source and target pixels whose keys they are compared with.
        options: Those of the loss.
        softmax: Whether rows go through a softmax.
    """
    for pixels in candidates:
        if pixels.keys is None:
            pixels.share(torch.bfloat16 if options.dtype == "bf16" else pixels.x.dtype)
    (source, target), (source_keys, target_keys) = queries, candidates

    def direction(query: Pixels, keys: Pixels) -> Direction:
        exact = softmax and query.gradients and not options.detach_statistics and sum(keys.counts) > 1
        return Direction(query, keys, options, softmax, query.x.new_zeros(len(query.x)) if exact else None)

    return direction(source, target_keys), direction(target, source_keys)


def add_gradient_through_deviation(direction: Direction) -> None:
    """Add the gradient through each row's standard deviation, from the `d_sigma` of its backward pass. Collective.

    `var_i = q_i' Cov(k) q_i`, so `d sigma_i = q_i' Cov(k) dq_i / sigma_i` and, for each key,
    `(q_i . k_j) q_i . dk_j / ((m - 1) sigma_i)`: two products with C x C matrices, and no pass over similarities.
    """
    queries, candidates = direction.queries, direction.candidates
    assert direction.d_sigma is not None
    covariance = candidates.covariance()
    moment = torch.zeros_like(covariance)
    rows = direction.d_sigma.nonzero()[:, 0]
    for part in torch.split(rows, 1024):
        query = queries.query(part)
        spread = query @ covariance
        sigma = (spread * query).sum(dim=1, keepdim=True).clamp(min=torch.finfo(query.dtype).tiny).sqrt()
        scale = direction.d_sigma[part, None] / sigma
        queries.add_query_gradient(part, scale * spread)
        moment += query.T @ (scale * query)
    if candidates.key_gradient is not None:
        candidates.add_key_gradient_through(candidates.pool.sum(moment) / max(1, sum(candidates.counts) - 1))
