"""One retrieval pass of a cycle: queries of one domain, keys of all candidates of the other, and gradients of both."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dist_pca.association.candidates import CandidateGroup, CandidateKeys
from dist_pca.association.method import LOG_EPSILON
from dist_pca.association.options import Options, Similarity
from dist_pca.association.tiles import Kernels, TorchKernels

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


class RowMatches(NamedTuple):
    """Matches of k queries, with their softmax statistics where the online softmax has computed them."""

    key_index: torch.Tensor
    """int64 [k], best key among all candidates."""
    logit: torch.Tensor | None = None
    """[k], logit of the match, `q . k / sigma`."""
    logsumexp: torch.Tensor | None = None
    """[k], log-sum-exp of the logits over all candidates."""
    sigma: torch.Tensor | None = None
    """[k, 1], temperature."""

    def select(self, rows: torch.Tensor) -> "RowMatches":
        """Select rows."""
        logit, logsumexp, sigma = (None if field is None else field[rows] for field in self[1:])
        return RowMatches(self.key_index[rows], logit, logsumexp, sigma)


@dataclass(frozen=True)
class RetrievalPass:
    """Retrieval source → target or target → source: this rank's queries against the keys of all candidates."""

    queries: Pixels
    key_pixels: Pixels
    """This rank's pixels of the other domain, whose keys are built and whose key gradient is accumulated."""
    softmax: bool
    """Whether rows go through a softmax; those of a guide that gives no keys are matched only."""
    d_sigma: torch.Tensor | None
    """[n], gradient of each query's `-log p` with respect to its standard deviation; None if that is detached."""
    kernels: Kernels | None
    """Kernels of the blockwise online softmax; None where every tile has whole rows of a single block of keys."""

    @property
    def keys(self) -> CandidateKeys:
        """Keys of all candidates."""
        assert self.key_pixels.keys is not None
        return self.key_pixels.keys

    @property
    def key_gradient(self) -> torch.Tensor | None:
        """Buffer of the gradient with respect to this rank's keys; None if they have no gradient."""
        return self.key_pixels.key_gradient


def retrieval_passes(
    queries: tuple[Pixels, Pixels], key_pixels: tuple[Pixels, Pixels], options: Options, *, softmax: bool
) -> tuple[RetrievalPass, RetrievalPass]:
    """Build the passes source → target and target → source, and keys that are not built yet. Collective.

    Args:
        queries: Source and target pixels of this rank.
        key_pixels: Source and target pixels of this rank that give the keys.
        options: Options of the loss.
        softmax: Whether rows go through a softmax.
    """
    for pixels in key_pixels:
        if pixels.keys is None:
            pixels.build_keys(torch.bfloat16 if options.dtype == "bf16" else pixels.x.dtype)
    (source, target), (source_keys, target_keys) = queries, key_pixels
    single_block = all(pixels.keys is not None and pixels.keys.is_single_block for pixels in key_pixels)
    kernels = (
        None if single_block and options.implementation == "blockwise" else _select_kernels(options, source.x.device)
    )

    def one_pass(query: Pixels, keys: Pixels) -> RetrievalPass:
        exact = softmax and query.gradients and not options.detach_statistics and sum(keys.counts) > 1
        return RetrievalPass(query, keys, softmax, query.x.new_zeros(len(query.x)) if exact else None, kernels)

    return one_pass(source, target_keys), one_pass(target, source_keys)


def add_gradient_through_sigma(retrieval: RetrievalPass) -> None:
    """Add the gradient through each row's standard deviation, from the `d_sigma` of the backward pass. Collective.

    The temperature of contrast normalisation (PLCA, section 3.1) is `sigma_i`, with `var_i = q_i' Cov(k) q_i`. Its
    gradients take two matmuls with [C, C] matrices and no pass over similarities:

        d sigma_i / d q_i = Cov(k) q_i / sigma_i
        d sigma_i / d k_j = (q_i . k_j) q_i / ((m - 1) sigma_i)
    """
    queries, key_pixels = retrieval.queries, retrieval.key_pixels
    assert retrieval.d_sigma is not None
    covariance = key_pixels.key_covariance()
    moment = torch.zeros_like(covariance)
    rows = retrieval.d_sigma.nonzero()[:, 0]
    for part in torch.split(rows, BLOCK_ROWS):
        query = queries.query(part)
        # sigma_i = sqrt(q_i' Cov q_i).
        projected = query @ covariance
        sigma = (projected * query).sum(dim=1, keepdim=True).clamp(min=torch.finfo(query.dtype).tiny).sqrt()
        # dq_i += d_sigma_i / sigma_i * Cov q_i.
        scale = retrieval.d_sigma[part, None] / sigma
        queries.add_query_gradient(part, scale * projected)
        # M = sum_i d_sigma_i / sigma_i * q_i q_i'.
        moment += query.T @ (scale * query)
    if key_pixels.key_gradient is not None:
        # dk_j += M k_j / (m - 1).
        total = key_pixels.candidates.all_reduce_sum(moment)
        key_pixels.add_key_gradient_through(total / max(1, sum(key_pixels.counts) - 1))


def _select_kernels(options: Options, device: torch.device) -> Kernels:
    """Choose the kernels of the online softmax: PyTorch tiles or Triton.

    Raises:
        ValueError: `triton` cannot run on this device.
    """
    if options.implementation != "triton":
        return TorchKernels()
    from dist_pca.association.triton_launch import TritonKernels, can_run

    if not can_run(device):
        raise ValueError(
            f"implementation=triton cannot run on {device}: it needs Triton and an NVIDIA GPU from Ampere on"
        )
    return TritonKernels(options.deterministic)
