"""Gradient diffusion: spatial aggregation of the target before association (PLCA, section 3.2)."""

import torch
import torch.nn.functional as F

from dist_pca.association.similarity import Similarity, keys, normalised
from dist_pca.association.statistics import temperature_by_covariance


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
            centred = key - key.mean(dim=1, keepdim=True)
            sigma = temperature_by_covariance(query, centred.mT @ centred / max(1, key.shape[1] - 1))
            query = rows / (sigma.detach() if detach_statistics else sigma)
        # The fused kernels want a head axis, [B, heads, n, C], and channels that make whole vectors; where they do not
        # get that, PyTorch forms the n x n matrix. Zeros change no product.
        channels = x.shape[-1]
        query, key, value = (F.pad(rows, (0, -channels % 8))[:, None] for rows in (query, key, x))
        aggregate = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0, :, :channels]
        return (1 - alpha) * x + alpha * aggregate
