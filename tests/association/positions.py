"""Drawn positions of two domains, for the tests of this folder."""

import torch

from dist_pca.association.similarity import Similarity

CLASSES = 3


def domain(n: int, channels: int, similarity: Similarity, seed: int) -> torch.Tensor:
    """fp64 rows [n, channels]: features, or for `kl` probabilities."""
    rows = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.softmax(dim=1) if similarity == "kl" else rows


def labels_of(n: int, seed: int, classes: int = CLASSES) -> torch.Tensor:
    """Labels [n], some of them 255."""
    labels = torch.randint(0, classes + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.where(labels == classes, 255, labels)
