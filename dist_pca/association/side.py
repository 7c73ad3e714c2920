"""One domain's positions on this rank: as queries, as keys, and the gradient of both with respect to what was given."""

import torch

from dist_pca.association.pool import Pool
from dist_pca.association.similarity import LOG_EPSILON, Similarity

NORM_EPSILON = 1e-12
"""Least norm a feature is divided by, as in `torch.nn.functional.normalize`."""


class Side:
    """Rows x [n, C] of one domain. Keys are centred over the pool.

    A shift of all keys shifts every row of similarities, which no argmax and no softmax sees; without it a row's
    variance is a plain sum of squares, and nothing cancels where all pixels resemble each other. Unit rows are kept
    centred only: queries are made from them a block at a time.
    """

    def __init__(self, x: torch.Tensor, similarity: Similarity, pool: Pool, pool_rows: int, *, gradients: bool) -> None:
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if similarity == "cosine":
            self.norm = x.norm(dim=1, keepdim=True).clamp_(min=NORM_EPSILON)
            self.probabilities = None
            self.key = x / self.norm
        else:
            self.probabilities = x
            self.key = torch.log(x + LOG_EPSILON)
        self.centre = pool.sum(self.key.sum(dim=0)) / pool_rows
        self.key -= self.centre
        self.gradients = gradients
        if gradients:
            self.query_gradient = torch.zeros_like(self.key)
            # Unit rows are query and key at once, so their gradients add up in one place.
            self.key_gradient = self.query_gradient if similarity == "cosine" else torch.zeros_like(self.key)

    def query(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Some rows as queries, [k, C]."""
        return self.key[rows] + self.centre if self.probabilities is None else self.probabilities[rows]

    def covariance(self, pool: Pool, pool_rows: int) -> torch.Tensor:
        """Unbiased covariance [C, C] of the pool's keys. Collective."""
        return pool.sum(self.key.T @ self.key) / max(1, pool_rows - 1)

    def gradient(self) -> torch.Tensor:
        """Gradient with respect to x, [n, C]; takes the place of what was accumulated."""
        if self.probabilities is not None:
            return self.query_gradient.add_(self.key_gradient / (self.probabilities + LOG_EPSILON))
        # The gradient through x / |x| has no part along x. Block by block, to need no copy of all rows.
        for unit, gradient, norm in zip(
            *(torch.split(rows, 1024) for rows in (self.key, self.query_gradient, self.norm)), strict=True
        ):
            row = unit + self.centre
            gradient.sub_(row * (gradient * row).sum(dim=1, keepdim=True)).div_(norm)
        return self.query_gradient
