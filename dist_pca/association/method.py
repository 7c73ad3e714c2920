"""The method as the paper has it, dense and differentiated by autograd, to be read and compared with.

Both similarities are one matmul, queries times keys. Cosine is `x . y` of unit vectors. The negative Kullback-Leibler
divergence is `-KL(p || q) = p . log q - p . log p`, whose second part is constant in each row: it changes no argmax
and, like the row mean, no softmax (PLCA, section 3.1). So `p . log q` takes its place.

Contrast normalisation z-scores every row of similarities over its candidates before its softmax,
`(D - mu_i) / (sigma_i + eps)`. A softmax does not change with the mean, so what is left is a temperature of each row,
its standard deviation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dist_pca.association.candidates import CandidateGroup
from dist_pca.association.options import Inputs, Options, Similarity
from dist_pca.distributed import all_gather

LOG_EPSILON = 1e-10
"""Added to probabilities inside logarithms, as in the authors' released run."""
SIGMA_EPSILON = 1e-10
"""Added to the standard deviation."""


def normalised(x: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """Scale features to unit length for cosine; probabilities for kl stay as they are. [..., n, C]."""
    return F.normalize(x, dim=-1) if similarity == "cosine" else x


def keys(x: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """Make keys of normalised pixels: themselves for cosine, `log(x + eps)` for kl. [..., n, C]."""
    return x if similarity == "cosine" else torch.log(x + LOG_EPSILON)


def temperature(similarity: torch.Tensor) -> torch.Tensor:
    """Compute the unbiased standard deviation of each row plus epsilon, [n, 1] of [n, m].

    A single candidate has deviation 0.
    """
    if similarity.shape[-1] == 1:
        return torch.full_like(similarity, SIGMA_EPSILON)
    return similarity.std(dim=-1, keepdim=True) + SIGMA_EPSILON


def temperature_by_covariance(query: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Compute the temperature of each row of `query @ key.T` without the matrix: `var_i = q_i' Cov(key) q_i`.

    Args:
        query: [..., n, C].
        covariance: [..., C, C], unbiased covariance of the keys.

    Returns:
        [..., n, 1].
    """
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    # The square root has an infinite derivative at 0, where rounding may also give a negative variance.
    return variance.clamp(min=SIGMA_EPSILON**2).sqrt() + SIGMA_EPSILON


class Cycles(NamedTuple):
    """Cycles of all N_s source pixels, the same on each rank whose pixels are candidates."""

    matches: torch.Tensor
    """int64 [N_s], best target pixel j* of each."""
    labels: torch.Tensor
    """int64 [N_s], labels of the source pixels."""
    consistent: torch.Tensor
    """bool [N_s], whether each cycle ends in its own class."""
    kept: torch.Tensor
    """bool [N_s], whether it is consistent, and the teacher, if it checks, sees that class at j* too."""
    weights: torch.Tensor | None
    """[N_s], target weight of j*; None where every cycle has weight 1."""
    contrast: Callable[[torch.Tensor | None], torch.Tensor]
    """Compute the loss of this rank's share of the kept cycles from the scale s of each class, [K], or None for
    1: a scalar with a graph, whose sum over ranks is `-sum_i w_i s_y(i) [log p(i -> j*) + log p(j* -> i*)]`.
    Collective; to be called once."""


def are_consistent(
    labels: torch.Tensor, end_labels: torch.Tensor, seen_classes: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Check cycle consistency, `y_i = y_i*` (PLCA, equation 3), and the teacher's class at j* if there is one.

    Args:
        labels: int64 [n], labels of the source pixels i.
        end_labels: int64 [n], labels of the source pixels i* in which the cycles end.
        seen_classes: int64 [n], teacher's classes of the matched target pixels j*; None to leave them unchecked.
        ignore_index: Label of pixels that neither start nor end a cycle.

    Returns:
        bool [n].
    """
    consistent = (labels == end_labels) & (labels != ignore_index)
    return consistent if seen_classes is None else consistent & (labels == seen_classes)


def scale_by_class(weights: torch.Tensor, classes: torch.Tensor, class_scale: torch.Tensor | None) -> torch.Tensor:
    """Multiply the weight of each cycle by the scale of its class.

    Args:
        weights: [n].
        classes: int64 [n].
        class_scale: fp64 [K]; None for 1.
    """
    return weights if class_scale is None else (weights * class_scale[classes]).to(weights.dtype)


class QueriesAndKeys(NamedTuple):
    """Queries and keys of both directions of a cycle."""

    source_queries: torch.Tensor
    """[n_s, C], source pixels of this rank, which start cycles."""
    target_keys: torch.Tensor
    """[N_t, C], all candidates of the match source → target."""
    target_queries: torch.Tensor
    """[N_t, C], all target pixels."""
    source_keys: torch.Tensor
    """[N_s, C], all candidates of the match target → source."""


class CycleLikelihoods(NamedTuple):
    """Cycles of n_s source pixels and the log-likelihoods of both steps."""

    match: torch.Tensor
    """int64 [n_s], best target pixel j* of each source pixel i."""
    end: torch.Tensor
    """int64 [n_s], best source pixel i* of j*."""
    forward: torch.Tensor
    """[n_s], `log p(i -> j*)`, with a graph."""
    backward: torch.Tensor
    """[n_s], `log p(j* -> i*)`, with a graph."""


def cycle_likelihoods(
    pixels: QueriesAndKeys, guide: QueriesAndKeys | None, detach_statistics: bool
) -> CycleLikelihoods:
    """Associate source pixels with target pixels and back (PLCA, equations 1 to 6).

    Args:
        pixels: Queries and keys of both softmaxes.
        guide: Queries and keys that choose the matches in their place.
        detach_statistics: Stop the gradient through each row's standard deviation.
    """
    # D(i, j), and j*(i) = argmax_j D(i, j).
    forward = pixels.source_queries @ pixels.target_keys.T
    guide_forward = forward if guide is None else guide.source_queries @ guide.target_keys.T
    match = guide_forward.argmax(dim=1)
    # D(j*, i'), and i*(i) = argmax_i' D(j*, i').
    backward = pixels.target_queries[match] @ pixels.source_keys.T
    guide_backward = backward if guide is None else guide.target_queries[match] @ guide.source_keys.T
    end = guide_backward.argmax(dim=1)
    # log p(i -> j*) and log p(j* -> i*).
    return CycleLikelihoods(
        match,
        end,
        _log_likelihood(forward, match, detach_statistics),
        _log_likelihood(backward, end, detach_statistics),
    )


def _log_likelihood(similarity: torch.Tensor, match: torch.Tensor, detach_statistics: bool) -> torch.Tensor:
    """Compute `log softmax_j((D(i, j) - mu_i) / sigma_i)` at each row's match, [n] of [n, m]."""
    # The softmax does not depend on mu_i.
    sigma = temperature(similarity.detach() if detach_statistics else similarity)
    return torch.log_softmax(similarity / sigma, dim=1).gather(1, match[:, None])[:, 0]


def find_cycles(inputs: Inputs, candidates: CandidateGroup, options: Options) -> Cycles:
    """Find the cycles of all source pixels; pixels are gathered. Collective, as is the backward pass.

    Args:
        inputs: Pixels of this rank.
        candidates: Ranks whose pixels are candidates.
        options: Equal on all ranks.
    """
    source, target = (_normalised(x, options) for x in (inputs.source, inputs.target))
    guide = None
    if inputs.guide is not None:
        guide_source, guide_target = (_normalised(x.to(source.dtype), options) for x in inputs.guide)
        guide = _queries_and_keys(guide_source, guide_target, None, candidates, options)
    pixels = _queries_and_keys(source, target, guide if options.guide_keys else None, candidates, options)
    found = cycle_likelihoods(pixels, guide, options.detach_statistics)

    labels = candidates.all_gather(inputs.labels, candidates.source_counts)
    seen = weights = None
    if inputs.target_classes is not None:
        seen = candidates.all_gather(inputs.target_classes, candidates.target_counts)[found.match]
    if inputs.target_weights is not None:
        target_weights = inputs.target_weights.to(source.dtype)
        weights = candidates.all_gather(target_weights, candidates.target_counts)[found.match]
    # y_i = y_i*, and for kept cycles the teacher's class at j* too.
    consistent, kept = (
        are_consistent(inputs.labels, labels[found.end], at_match, options.ignore_index) for at_match in (None, seen)
    )

    def contrast(class_scale: torch.Tensor | None) -> torch.Tensor:
        """Compute `-sum_i w_i s_y(i) [log p(i -> j*) + log p(j* -> i*)]` over kept cycles."""
        weight = torch.ones_like(found.forward.detach()) if weights is None else weights
        weight = scale_by_class(weight[kept], inputs.labels[kept], class_scale)
        # A zero with a graph, in case no cycle is kept.
        total = sum((x.sum() * 0 for x in pixels), start=weight.new_zeros(()))
        for log_likelihood in (found.forward, found.backward):
            total = total - (weight * log_likelihood[kept]).sum()
        return total

    return Cycles(
        candidates.all_gather(found.match, candidates.source_counts),
        labels,
        candidates.all_gather(consistent, candidates.source_counts),
        candidates.all_gather(kept, candidates.source_counts),
        None if weights is None else candidates.all_gather(weights, candidates.source_counts),
        contrast,
    )


def _queries_and_keys(
    source: torch.Tensor,
    target: torch.Tensor,
    guide: QueriesAndKeys | None,
    candidates: CandidateGroup,
    options: Options,
) -> QueriesAndKeys:
    """Make queries of normalised pixels, and keys of them or of the guide, over all candidates."""
    all_targets = _gathered(target, candidates)
    if guide is not None:
        return QueriesAndKeys(source, guide.target_keys, all_targets, guide.source_keys)
    all_sources = _gathered(source, candidates)
    return QueriesAndKeys(
        source, keys(all_targets, options.similarity), all_targets, keys(all_sources, options.similarity)
    )


def _gathered(pixels: torch.Tensor, candidates: CandidateGroup) -> torch.Tensor:
    if candidates.ranks == 1:
        return pixels
    # Every other rank gets a copy, and returns as many bytes of gradient if there is one.
    copies = (1 + pixels.requires_grad) * (candidates.ranks - 1)
    candidates.sent_bytes += copies * pixels.numel() * pixels.element_size()
    return all_gather(pixels, candidates.process_group)


def _normalised(pixels: torch.Tensor, options: Options) -> torch.Tensor:
    return normalised(pixels.to(torch.promote_types(pixels.dtype, torch.float32)), options.similarity)


def diffuse(
    x: torch.Tensor, alpha: float, similarity: Similarity = "cosine", *, detach_statistics: bool = True
) -> torch.Tensor:
    """Compute `(1 - alpha) x + alpha softmax(similarity) x` within each image (PLCA, equation 9).

    The softmax runs over all pixels of the image, the pixel itself included. For cosine each row of similarities is
    divided by its standard deviation; for `kl` it is not, as in the authors' released run. This is attention with the
    pixels as values, so it runs in PyTorch's fused kernels, in memory linear in pixels.

    Args:
        x: [B, n, C] features, or class probabilities for `kl`; the result is then a distribution again.
        alpha: Share of the aggregate, 0 to 1.
        similarity: `cosine` or `kl`.
        detach_statistics: Stop the gradient through each row's standard deviation.

    Returns:
        [B, n, C] in fp32, or in fp64 for fp64 inputs.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        query = normalised(x, similarity)
        key = keys(query, similarity)
        if similarity == "cosine":
            # sigma_j = sqrt(q_j' Cov(k) q_j) within each image.
            centred = key - key.mean(dim=1, keepdim=True)
            sigma = temperature_by_covariance(query, centred.mT @ centred / max(1, key.shape[1] - 1))
            query = query / (sigma.detach() if detach_statistics else sigma)
        # The fused kernels need a head axis, [B, heads, n, C], and channels in multiples of 8; otherwise PyTorch forms
        # the n x n matrix. Zeros change no product.
        channels = x.shape[-1]
        query, key, value = (F.pad(rows, (0, -channels % 8))[:, None] for rows in (query, key, x))
        # sum_j' softmax_j'(q_j . k_j' / sigma_j) x_j'.
        aggregate = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0, :, :channels]
        return (1 - alpha) * x + alpha * aggregate
