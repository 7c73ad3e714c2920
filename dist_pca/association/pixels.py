"""Pixels of one domain on this rank: queries, keys, and gradients with respect to the input of both."""

import torch

from dist_pca.association.candidates import CandidateGroup, CandidateKeys
from dist_pca.association.method import LOG_EPSILON
from dist_pca.association.options import Similarity

NORM_EPSILON = 1e-12
"""Least norm a feature is divided by, as in `torch.nn.functional.normalize`."""
BLOCK_ROWS = 1024
"""Rows processed at a time where all of them at once would need a copy."""


class Pixels:
    """Pixels x [n, C] of one domain: queries at once, and keys after `build_keys`.

    Keys are centred over all candidates. A shift of all keys shifts every row of similarities, which changes no argmax
    and no softmax (PLCA, section 3.1); with centred keys a row's variance is a plain sum of squares, and nothing
    cancels where all pixels resemble each other.

    Args:
        x: [n, C] features, or class probabilities for `kl`, in fp32 or fp64.
        similarity: `cosine` or `kl`.
        candidates: Ranks whose keys are centred together.
        counts: Pixels of each rank.
        unnormalised: Keep features as keys without scaling and centring, which saves a copy of all rows;
            `CandidateKeys` then has the scale and the shift of their products.
        gradients: Whether gradients are accumulated.
    """

    def __init__(
        self,
        x: torch.Tensor,
        similarity: Similarity,
        candidates: CandidateGroup,
        counts: list[int],
        *,
        unnormalised: bool,
        gradients: bool,
    ) -> None:
        self.x, self.candidates, self.counts = x, candidates, counts
        self.unnormalised, self.gradients = unnormalised, gradients
        self.inverse_norm: torch.Tensor | None = None
        if similarity == "cosine":
            self.inverse_norm = 1 / x.norm(dim=1, keepdim=True).clamp_(min=NORM_EPSILON)
        self.keys: CandidateKeys | None = None
        self.local_keys: torch.Tensor | None = None
        self.query_gradient = torch.zeros_like(x) if gradients else None
        self.key_gradient: torch.Tensor | None = None

    def query(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Select pixels as queries [k, C]: `x / |x|` for cosine, `x` for kl."""
        return self.x[rows] if self.inverse_norm is None else self.x[rows] * self.inverse_norm[rows]

    def build_keys(self, dtype: torch.dtype) -> None:
        """Make the pixels keys of all candidates, for matmuls in `dtype`. Collective."""
        total = sum(self.counts)
        if self.inverse_norm is None:
            # k_j = log(x_j + eps) - mean over all candidates.
            self.local_keys = torch.log(self.x + LOG_EPSILON)
            self.mean_key = self.candidates.all_reduce_sum(self.local_keys.sum(dim=0)) / total
            self.local_keys -= self.mean_key
            self.keys = self.candidates.distribute_keys(self.local_keys, self.counts, dtype)
        else:
            # k_j = x_j / |x_j| - mean over all candidates.
            self.mean_key = self.candidates.all_reduce_sum((self.inverse_norm.T @ self.x)[0]) / total
            if self.unnormalised:
                self.keys = CandidateKeys(
                    self.candidates, self.x, self.counts, dtype, self.inverse_norm[:, 0], self.mean_key
                )
            else:
                # Not kept: the few later uses of this rank's keys recompute them.
                keys = (self.x * self.inverse_norm).sub_(self.mean_key)
                self.keys = self.candidates.distribute_keys(keys, self.counts, dtype)
        if self.query_gradient is not None:
            # For cosine, queries and keys are the same unit rows but for a constant, so one buffer accumulates both
            # gradients. For unnormalised keys it accumulates gradients divided by the norm, as their matmuls give them.
            self.key_gradient = torch.zeros_like(self.x) if self.inverse_norm is None else self.query_gradient

    def key_covariance(self) -> torch.Tensor:
        """Compute the unbiased covariance [C, C] of all candidates' keys. Collective."""
        moment = self.x.new_zeros((self.x.shape[1],) * 2)
        for part in self._blocks():
            moment.addmm_(self._centred(part).T, self._centred(part))
        return self.candidates.all_reduce_sum(moment) / max(1, sum(self.counts) - 1)

    def add_query_gradient(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add dq [k, C] of some queries, each of which appears once."""
        assert self.query_gradient is not None
        self.query_gradient[rows] += self._as_accumulated(gradient, rows)

    def add_key_gradient_through(self, moment: torch.Tensor) -> None:
        """Add `keys @ moment`, with moment [C, C], to dk."""
        assert self.key_gradient is not None
        for part in self._blocks():
            self.key_gradient[part] += self._as_accumulated(self._centred(part) @ moment, part)

    def gradient(self) -> torch.Tensor:
        """Return the gradient with respect to x [n, C]; overwrites the accumulated gradients."""
        assert self.query_gradient is not None
        if self.inverse_norm is None:
            if self.key_gradient is not None:
                # dx = dq + dk / (x + eps).
                self.query_gradient.add_(self.key_gradient / (self.x + LOG_EPSILON))
            return self.query_gradient
        for part in self._blocks():
            gradient, unit = self.query_gradient[part], self.query(part)
            if not self.unnormalised:
                gradient *= self.inverse_norm[part]
            # With u = x / |x|: dx = (du - u (u . du)) / |x|.
            gradient -= unit * (gradient * unit).sum(dim=1, keepdim=True)
        return self.query_gradient

    def _as_accumulated(self, gradient: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Convert a gradient with respect to unit rows [k, C] to the one that the buffers accumulate."""
        if self.unnormalised and self.inverse_norm is not None:
            return gradient * self.inverse_norm[rows]
        return gradient

    def _centred(self, rows: slice) -> torch.Tensor:
        return self.query(rows) - self.mean_key if self.local_keys is None else self.local_keys[rows]

    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK_ROWS) for start in range(0, len(self.x), BLOCK_ROWS)]
