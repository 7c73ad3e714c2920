"""One domain's pixels on this rank: as queries, as keys, and the gradient of both with respect to what was given."""

import torch

from dist_pca.association.pool import Keys, Pool
from dist_pca.association.similarity import LOG_EPSILON, Similarity

NORM_EPSILON = 1e-12
"""Least norm a feature is divided by, as in `torch.nn.functional.normalize`."""
BLOCK_ROWS = 1024
"""Rows that are worked on at a time where all of them at once would need a copy."""


class Pixels:
    """Rows x [n, C] of one domain: queries at once, and keys from `share` on. Keys are centred over the pool.

    A shift of all keys shifts every row of similarities, which no argmax and no softmax sees; without it a row's
    variance is a plain sum of squares, and nothing cancels where all pixels resemble each other.

    Args:
        x: [n, C] features, or class probabilities for `kl`, in fp32 or more.
        similarity: What makes rows alike.
        pool: Ranks whose keys are centred together.
        counts: Rows of each rank of the pool.
        unnormalised: Features serve as keys as they were given, unscaled and not centred, which saves a copy of all
            rows; `Keys` then has what their products lack.
        gradients: Whether gradients are accumulated.
    """

    def __init__(
        self,
        x: torch.Tensor,
        similarity: Similarity,
        pool: Pool,
        counts: list[int],
        *,
        unnormalised: bool,
        gradients: bool,
    ) -> None:
        self.x, self.pool, self.counts = x, pool, counts
        self.unnormalised, self.gradients = unnormalised, gradients
        self.inverse_norm: torch.Tensor | None = None
        if similarity == "cosine":
            self.inverse_norm = 1 / x.norm(dim=1, keepdim=True).clamp_(min=NORM_EPSILON)
        self.keys: Keys | None = None
        self.key: torch.Tensor | None = None
        self.query_gradient = torch.zeros_like(x) if gradients else None
        self.key_gradient: torch.Tensor | None = None

    def query(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Select rows as queries, [k, C]."""
        return self.x[rows] if self.inverse_norm is None else self.x[rows] * self.inverse_norm[rows]

    def share(self, dtype: torch.dtype) -> None:
        """Make the rows keys for passes over the whole pool in `dtype`. Collective."""
        candidates = sum(self.counts)
        if self.inverse_norm is None:
            self.key = torch.log(self.x + LOG_EPSILON)
            self.centre = self.pool.sum(self.key.sum(dim=0)) / candidates
            self.key -= self.centre
            self.keys = self.pool.share(self.key, self.counts, dtype)
        else:
            self.centre = self.pool.sum((self.inverse_norm.T @ self.x)[0]) / candidates
            if self.unnormalised:
                self.keys = Keys(self.pool, self.x, self.counts, dtype, self.inverse_norm[:, 0], self.centre)
            else:
                # The little that asks for unshared keys later makes them anew.
                self.keys = self.pool.share((self.x * self.inverse_norm).sub_(self.centre), self.counts, dtype)
        if self.query_gradient is not None:
            # Of features both are with respect to the unit row, and one buffer serves both. Where keys are
            # unnormalised, it is divided by the norm, since that is what the products give.
            self.key_gradient = torch.zeros_like(self.x) if self.inverse_norm is None else self.query_gradient

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance [C, C] of the pool's keys. Collective."""
        moment = self.x.new_zeros((self.x.shape[1],) * 2)
        for part in self._blocks():
            moment.addmm_(self._centred(part).T, self._centred(part))
        return self.pool.sum(moment) / max(1, sum(self.counts) - 1)

    def add_query_gradient(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a gradient [k, C] with respect to some rows, each once, as queries."""
        assert self.query_gradient is not None
        self.query_gradient[rows] += self._stored(gradient, rows)

    def add_key_gradient_through(self, moment: torch.Tensor) -> None:
        """Add `key @ moment`, of [C, C], to the gradient with respect to keys."""
        assert self.key_gradient is not None
        for part in self._blocks():
            self.key_gradient[part] += self._stored(self._centred(part) @ moment, part)

    def gradient(self) -> torch.Tensor:
        """Gradient with respect to x, [n, C]; takes the place of what was accumulated."""
        assert self.query_gradient is not None
        if self.inverse_norm is None:
            if self.key_gradient is not None:
                self.query_gradient.add_(self.key_gradient / (self.x + LOG_EPSILON))
            return self.query_gradient
        for part in self._blocks():
            gradient, unit = self.query_gradient[part], self.query(part)
            if not self.unnormalised:
                gradient *= self.inverse_norm[part]
            # The gradient through x / |x| has no part along x.
            gradient -= unit * (gradient * unit).sum(dim=1, keepdim=True)
        return self.query_gradient

    def _stored(self, gradient: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Convert a gradient with respect to unit rows, [k, C], to what the buffer holds."""
        if self.unnormalised and self.inverse_norm is not None:
            return gradient * self.inverse_norm[rows]
        return gradient

    def _centred(self, rows: slice) -> torch.Tensor:
        return self.query(rows) - self.centre if self.key is None else self.key[rows]

    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK_ROWS) for start in range(0, len(self.x), BLOCK_ROWS)]
