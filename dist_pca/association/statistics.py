"""Contrast normalisation: a temperature per row (PLCA, section 3.1).

Every row of similarities is z-scored over its candidates and then goes through a softmax. A softmax does not see the
mean, so what is left is division by the row's standard deviation.
"""

import torch

SIGMA_EPSILON = 1e-10
"""Added to the standard deviation."""


def temperature(similarity: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of each row plus epsilon, [n, 1] of [n, m]; a single candidate has deviation 0."""
    if similarity.shape[-1] == 1:
        return torch.full_like(similarity, SIGMA_EPSILON)
    return similarity.std(dim=-1, keepdim=True) + SIGMA_EPSILON


def temperature_by_covariance(query: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The same, [..., n, 1], of the rows of `query @ key.T` that nobody has to form: `var_i = q_i' Cov(key) q_i`.

    Args:
        query: [..., n, C].
        covariance: [..., C, C], unbiased, of the keys.
    """
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    # The root's slope is infinite at 0, where rounding may also put a negative.
    return variance.clamp(min=SIGMA_EPSILON**2).sqrt() + SIGMA_EPSILON
