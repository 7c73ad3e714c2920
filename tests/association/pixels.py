"""Drawn pixels of two domains, for the tests of this folder."""

from typing import Any

import torch

from dist_pca.association.options import Similarity

CLASSES = 3


def domain(n: int, channels: int, similarity: Similarity, seed: int) -> torch.Tensor:
    """fp64 rows [n, channels]: features, or for `kl` probabilities."""
    rows = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.softmax(dim=1) if similarity == "kl" else rows


def labels_of(n: int, seed: int, classes: int = CLASSES) -> torch.Tensor:
    """Labels [n], some of them 255."""
    labels = torch.randint(0, classes + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.where(labels == classes, 255, labels)


def refinements(
    n_source: int,
    n_target: int,
    channels: int,
    similarity: Similarity,
    seed: int,
    *,
    classes: bool = False,
    weights: bool = False,
    guide: bool = False,
) -> dict[str, Any]:
    """Draw optional inputs of `cycle_association`: classes with some 255, weights with some 0, a guide's pixels."""
    drawn: dict[str, Any] = {}
    if classes:
        drawn["target_classes"] = labels_of(n_target, seed + 2)
    if weights:
        values = torch.rand(n_target, generator=torch.Generator().manual_seed(seed + 3), dtype=torch.float64)
        drawn["target_weights"] = (values - 0.2).clamp(min=0)
    if guide:
        drawn["guide"] = tuple(domain(n, channels, similarity, seed + 4 + n) for n in (n_source, n_target))
    return drawn
