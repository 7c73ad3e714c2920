"""Both similarities as one matmul: queries times keys.

Cosine is `x . y` of unit vectors. The negative Kullback-Leibler divergence is `-KL(p || q) = p . log q - p . log p`,
whose second part is constant in each row: it changes no argmax and, like the row mean, no softmax (PLCA, section 3.1).
So `p . log q` takes its place.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Similarity = Literal["cosine", "kl"]

LOG_EPSILON = 1e-10
"""Added to probabilities inside logarithms, as in the authors' released run."""


def normalised(x: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """Scale features to unit length for cosine; probabilities for kl stay as they are. [..., n, C]."""
    return F.normalize(x, dim=-1) if similarity == "cosine" else x


def keys(x: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """Make keys of normalised pixels: themselves for cosine, `log(x + eps)` for kl. [..., n, C]."""
    return x if similarity == "cosine" else torch.log(x + LOG_EPSILON)
