"""The matches of a cycle on their own, without a loss: for looking at what association does."""

from typing import NamedTuple

import torch

from dist_pca.association.direction import directions
from dist_pca.association.options import Options, Precision
from dist_pca.association.pixels import Pixels
from dist_pca.association.pool import Pool
from dist_pca.association.similarity import Similarity
from dist_pca.association.whole_rows import match_whole_rows


class Matches(NamedTuple):
    """Where the cycles of n_s source pixels lead."""

    targets: torch.Tensor
    """int64 [n_s]: best target pixel of each, j*."""
    ends: torch.Tensor
    """int64 [n_s]: best source pixel of that one, i*."""


@torch.no_grad()
def find_matches(
    source: torch.Tensor, target: torch.Tensor, *, similarity: Similarity = "cosine", dtype: Precision = "fp32"
) -> Matches:
    """Match source pixels to target pixels and back (PLCA, equations 1 to 3), in memory linear in pixels.

    These are the matches that `associate` finds for the same rows on one rank. Labels play no part in them.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] likewise.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        dtype: Type of the operands of matrix products.
    """
    rows = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (source, target)]
    counts = [len(source)], [len(target)]
    pool = Pool("local", None, 0, 1, *counts)
    # Unnormalised keys save a copy, and are rounded as those of the loss.
    unnormalised = similarity == "cosine" and dtype == "fp32"
    domains = tuple(
        Pixels(x, similarity, pool, count, unnormalised=unnormalised, gradients=False)
        for x, count in zip(rows, counts, strict=True)
    )
    options = Options(num_classes=0, similarity=similarity, dtype=dtype, implementation="blockwise")
    forward, backward = directions((domains[0], domains[1]), (domains[0], domains[1]), options, softmax=False)
    # j*(i) = argmax_j D(i, j), then i*(j) = argmax_i D(j, i) for each distinct j*.
    with torch.autocast(source.device.type, enabled=False):
        targets = match_whole_rows(forward, torch.arange(len(source), device=source.device)).best
        distinct, place = torch.unique(targets, return_inverse=True)
        return Matches(targets, match_whole_rows(backward, distinct).best[place])
