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
