"""The definition: the paper's formulas, dense and differentiated by autograd, to be read and compared with."""

from typing import NamedTuple

import torch

from dist_pca.association.candidates import CandidateGroup
from dist_pca.association.cycles import Cycles, are_consistent, scale_by_class
from dist_pca.association.options import Inputs, Options
from dist_pca.association.similarity import keys, normalised
from dist_pca.association.statistics import temperature
from dist_pca.distributed import all_gather


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
    # y_i = y_i*.
    consistent = are_consistent(inputs.labels, labels[found.end], seen, options.ignore_index)

    def contrast(class_scale: torch.Tensor | None) -> torch.Tensor:
        """Compute `-sum_i w_i s_y(i) [log p(i -> j*) + log p(j* -> i*)]` over consistent cycles."""
        weight = torch.ones_like(found.forward.detach()) if weights is None else weights
        weight = scale_by_class(weight[consistent], inputs.labels[consistent], class_scale)
        # A zero with a graph, in case no cycle is consistent.
        total = sum((x.sum() * 0 for x in pixels), start=weight.new_zeros(()))
        for log_likelihood in (found.forward, found.backward):
            total = total - (weight * log_likelihood[consistent]).sum()
        return total

    return Cycles(
        candidates.all_gather(found.match, candidates.source_counts),
        labels,
        candidates.all_gather(consistent, candidates.source_counts),
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
