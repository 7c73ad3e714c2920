"""Both similarities as one: the rows of a query matrix times the rows of a key matrix.

Cosine is `x . y` of unit vectors. The negative Kullback-Leibler divergence is `-KL(p || q) = p . log q - p . log p`,
whose second part is a constant of the row: it drops out of every argmax and, with the row mean, of every softmax
(PLCA, section 3.1). So `p . log q` serves in its place.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Similarity = Literal["cosine", "kl"]

LOG_EPSILON = 1e-10
"""Added to probabilities inside logarithms, as in the authors' released run."""


def normalised(x: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """What travels between ranks: unit rows for cosine, the rows as they are for kl. Shape [..., n, C] stays."""
    return F.normalize(x, dim=-1) if similarity == "cosine" else x


def keys(x: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """Key rows of normalised rows, [..., n, C]: the same for cosine, their logarithm for kl."""
    return x if similarity == "cosine" else torch.log(x + LOG_EPSILON)
