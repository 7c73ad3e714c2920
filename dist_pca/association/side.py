"""One domain's positions on this rank: as queries, as keys, and the gradient of both with respect to what was given."""

import torch

from dist_pca.association.pool import Keys, Pool
from dist_pca.association.similarity import LOG_EPSILON, Similarity

NORM_EPSILON = 1e-12
"""Least norm a feature is divided by, as in `torch.nn.functional.normalize`."""
BLOCK_ROWS = 1024
"""Rows that are worked on at a time where all of them at once would need a copy."""


class Side:
    """Rows x [n, C] of one domain. Keys are centred over the pool.

    A shift of all keys shifts every row of similarities, which no argmax and no softmax sees; without it a row's
    variance is a plain sum of squares, and nothing cancels where all pixels resemble each other.

    Args:
        x: [n, C] features, or class probabilities for `kl`.
        similarity: What makes rows alike.
        pool: Ranks whose keys are centred together.
        counts: Rows of each rank of the pool.
        as_given: Features serve as keys as they were given, unscaled and not centred, which saves a copy of all rows;
            `Keys` then says what their products lack.
        gradients: Someone asks for them.
    """

    def __init__(
        self, x: torch.Tensor, similarity: Similarity, pool: Pool, counts: list[int], *, as_given: bool, gradients: bool
    ) -> None:
        self.x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        self.pool, self.counts, self.as_given, self.gradients = pool, counts, as_given, gradients
        self.inverse_norm = None
        self.key = None
        if similarity == "cosine":
            self.inverse_norm = 1 / self.x.norm(dim=1, keepdim=True).clamp_(min=NORM_EPSILON)
            self.centre = pool.sum((self.inverse_norm.T @ self.x)[0]) / sum(counts)
            if not as_given:
                self.key = (self.x * self.inverse_norm).sub_(self.centre)
        else:
            self.key = torch.log(self.x + LOG_EPSILON)
            self.centre = pool.sum(self.key.sum(dim=0)) / sum(counts)
            self.key -= self.centre
        if gradients:
            # Of features both are with respect to the unit row, and one place serves both. Where rows are keys as
            # given, they are kept divided by the norm, since that is what the products give.
            self.query_gradient = torch.zeros_like(self.x)
            self.key_gradient = torch.zeros_like(self.x) if self.inverse_norm is None else self.query_gradient

    def query(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Some rows as queries, [k, C]."""
        return self.x[rows] if self.inverse_norm is None else self.x[rows] * self.inverse_norm[rows]

    def share(self, dtype: torch.dtype) -> Keys:
        """This side's keys for passes over the whole pool in `dtype`. Collective."""
        if self.key is None:
            assert self.inverse_norm is not None
            return Keys(self.pool, self.x, self.counts, dtype, self.inverse_norm[:, 0], self.centre)
        keys = self.pool.share(self.key, self.counts, dtype)
        if self.inverse_norm is not None:
            # What is shared serves from now on; the little that still asks for keys can make them anew.
            self.key = None
        return keys

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance [C, C] of the pool's keys. Collective."""
        total = self.x.new_zeros((self.x.shape[1],) * 2)
        for part in self._blocks():
            total.addmm_(self._centred(part).T, self._centred(part))
        return self.pool.sum(total) / max(1, sum(self.counts) - 1)

    def add_query_gradient(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a gradient [k, C] with respect to some rows, each once, as queries."""
        self.query_gradient[rows] += self._kept(gradient, rows)

    def add_key_gradient_through(self, moment: torch.Tensor) -> None:
        """Add `key @ moment`, of [C, C], to the gradient with respect to keys."""
        for part in self._blocks():
            self.key_gradient[part] += self._kept(self._centred(part) @ moment, part)

    def gradient(self) -> torch.Tensor:
        """Gradient with respect to x, [n, C]; takes the place of what was accumulated."""
        if self.inverse_norm is None:
            return self.query_gradient.add_(self.key_gradient / (self.x + LOG_EPSILON))
        for part in self._blocks():
            gradient, unit = self.query_gradient[part], self.query(part)
            if not self.as_given:
                gradient *= self.inverse_norm[part]
            # The gradient through x / |x| has no part along x.
            gradient -= unit * (gradient * unit).sum(dim=1, keepdim=True)
        return self.query_gradient

    def _kept(self, gradient: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """A gradient with respect to unit rows, [k, C], as it is kept."""
        return gradient * self.inverse_norm[rows] if self.as_given and self.inverse_norm is not None else gradient

    def _centred(self, rows: slice) -> torch.Tensor:
        return self.query(rows) - self.centre if self.key is None else self.key[rows]

    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK_ROWS) for start in range(0, len(self.x), BLOCK_ROWS)]
