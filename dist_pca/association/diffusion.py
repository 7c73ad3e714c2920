"""Gradient diffusion: spatial aggregation of the target before association (PLCA, section 3.2)."""

import torch
import torch.nn.functional as F

from dist_pca.association.similarity import Similarity, keys, normalised
from dist_pca.association.statistics import SIGMA_EPSILON


def diffuse(
    x: torch.Tensor, alpha: float, similarity: Similarity = "cosine", *, detach_statistics: bool = True
) -> torch.Tensor:
    """`(1 - alpha) x + alpha * softmax(similarity) x` within each image, itself included (PLCA, equation 9).

    For cosine each row of similarities is divided by its standard deviation; for `kl` it is not, as released. It is
    attention with the rows as values, so it runs in PyTorch's fused kernels and never holds an n x n matrix of its own.

    Args:
        x: [B, n, C] features, or class probabilities for `kl`; the result is then a distribution again.
        alpha: Share taken from the aggregate, 0 to 1.
        similarity: `cosine` or `kl`.
        detach_statistics: Stop the gradient through each row's standard deviation.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        rows = normalised(x, similarity)
        key = keys(rows, similarity)
        query = rows
        if similarity == "cosine":
            sigma = _row_deviation(rows, key)
            query = rows / (sigma.detach() if detach_statistics else sigma)
        # One head axis: the fused kernels want [B, heads, n, C].
        aggregate = F.scaled_dot_product_attention(query[:, None], key[:, None], x[:, None], scale=1.0)[:, 0]
        return (1 - alpha) * x + alpha * aggregate


def _row_deviation(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row of `query @ key.T`, [B, n, 1], by `var_i = q_i' Cov(key) q_i`: no n x n matrix."""
    candidates = key.shape[1]
    if candidates == 1:
        return torch.full_like(query[..., :1], SIGMA_EPSILON)
    centred = key - key.mean(dim=1, keepdim=True)
    covariance = centred.mT @ centred / (candidates - 1)
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    return variance.clamp(min=SIGMA_EPSILON**2).sqrt() + SIGMA_EPSILON
