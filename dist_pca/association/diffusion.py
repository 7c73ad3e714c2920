"""Gradient diffusion: spatial aggregation of the target before association (PLCA, section 3.2)."""

import torch
import torch.nn.functional as F

from dist_pca.association.similarity import Similarity, keys, normalised
from dist_pca.association.statistics import temperature_by_covariance


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
