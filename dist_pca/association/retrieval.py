"""One retrieval pass of a cycle: queries of one domain against all candidates of the other."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dist_pca.association.candidates import CandidateKeys
from dist_pca.association.kernels import Kernels, select_kernels
from dist_pca.association.options import Options
from dist_pca.association.pixels import Pixels


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
    kernels = None if single_block and options.implementation == "blockwise" else select_kernels(options, source.x)

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
    for part in torch.split(rows, 1024):
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
