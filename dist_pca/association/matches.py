"""Matches and cycles without a loss, for inspection."""

from typing import NamedTuple

import torch

from dist_pca.association.candidates import CandidateGroup
from dist_pca.association.options import Options, Precision, Similarity
from dist_pca.association.retrieval import Pixels, retrieval_passes
from dist_pca.association.single_block import match_single_block


class Matches(NamedTuple):
    """Cycles of n_s source pixels."""

    targets: torch.Tensor
    """int64 [n_s], best target pixel j* of each source pixel."""
    ends: torch.Tensor
    """int64 [n_s], best source pixel i* of that target pixel."""


@torch.no_grad()
def find_matches(
    source: torch.Tensor, target: torch.Tensor, *, similarity: Similarity = "cosine", dtype: Precision = "fp32"
) -> Matches:
    """Match source pixels to target pixels and back (PLCA, equations 1 to 3), in memory linear in pixels.

    These are the matches that `cycle_association` finds for the same pixels on one rank; labels play no part in them.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] features, or class probabilities for `kl`.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        dtype: Type of matmul operands.
    """
    rows = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (source, target)]
    counts = [len(source)], [len(target)]
    candidates = CandidateGroup("local", None, 0, 1, *counts)
    # Unnormalised keys save a copy, and are rounded like those of the loss.
    unnormalised = similarity == "cosine" and dtype == "fp32"
    domains = tuple(
        Pixels(x, similarity, candidates, count, unnormalised=unnormalised, gradients=False)
        for x, count in zip(rows, counts, strict=True)
    )
    options = Options(num_classes=0, similarity=similarity, dtype=dtype, implementation="blockwise")
    forward, backward = retrieval_passes((domains[0], domains[1]), (domains[0], domains[1]), options, softmax=False)
    # j*(i) = argmax_j D(i, j), then i*(j) = argmax_i D(j, i) for each distinct j*.
    with torch.autocast(source.device.type, enabled=False):
        targets = match_single_block(forward, torch.arange(len(source), device=source.device)).key_index
        distinct, inverse = torch.unique(targets, return_inverse=True)
        return Matches(targets, match_single_block(backward, distinct).key_index[inverse])
