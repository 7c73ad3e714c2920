"""Contrast normalisation as a temperature of each row (PLCA, section 3.1).

Every row of similarities is z-scored over its candidates before its softmax, `(D - mu_i) / (sigma_i + eps)`. A softmax
does not change with the mean, so what is left is division by the row's standard deviation.
"""

import torch

SIGMA_EPSILON = 1e-10
"""Added to the standard deviation."""


def temperature(similarity: torch.Tensor) -> torch.Tensor:
    """Compute the unbiased standard deviation of each row plus epsilon, [n, 1] of [n, m].

    A single candidate has deviation 0.
    """
    if similarity.shape[-1] == 1:
        return torch.full_like(similarity, SIGMA_EPSILON)
    return similarity.std(dim=-1, keepdim=True) + SIGMA_EPSILON


def temperature_by_covariance(query: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Compute the temperature of each row of `query @ key.T` without the matrix: `var_i = q_i' Cov(key) q_i`.

    Args:
        query: [..., n, C].
        covariance: [..., C, C], unbiased covariance of the keys.

    Returns:
        [..., n, 1].
    """
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    # The square root has an infinite derivative at 0, where rounding may also give a negative variance.
    return variance.clamp(min=SIGMA_EPSILON**2).sqrt() + SIGMA_EPSILON
