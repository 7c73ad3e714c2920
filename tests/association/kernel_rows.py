"""Rows for the fused kernels where they run here, and the plain formulas that their results are held to."""

import math
import os

import torch

from dist_pca.association.tiles import BlockMatch
from dist_pca.association.triton_launch import TritonKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def rows(n: int, channels: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * x / math.sqrt(channels)).to(dtype).to(DEVICE)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Nowhere further apart than `bound`, which says of what size the parts of a sum were."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"{float(error.max())} apart, at most {bound} allowed"


def largest_product(query: torch.Tensor, key: torch.Tensor) -> float:
    """Bound on the products, before their parts cancel: rounding is relative to it."""
    return float(query.double().norm(dim=1).max() * key.double().norm(dim=1).max())


def assert_matches(found: BlockMatch, query: torch.Tensor, key: torch.Tensor, tolerance: float) -> None:
    z = query.double() @ key.double().T
    size = largest_product(query, key)
    assert found.key_index.dtype == torch.int64
    assert_near(found.logit, z.amax(dim=1), tolerance * size)
    # A product that rounding may have put above the largest is as good an answer.
    assert_near(z.gather(1, found.key_index[:, None])[:, 0], z.amax(dim=1), tolerance * size)
    if found.logsumexp is not None:
        assert_near(found.logsumexp, z.logsumexp(dim=1), tolerance * (1 + size))


def assert_backward(
    query: torch.Tensor, key: torch.Tensor, weighted: torch.Tensor, deterministic: bool, tolerance: float
) -> None:
    z = query.double() @ key.double().T
    logsumexp = z.logsumexp(dim=1)
    p = torch.exp(z - logsumexp[:, None])
    # Exponentials are as uncertain as products.
    tolerance = max(tolerance, 1e-6 * largest_product(query, key))
    before = rows(len(key), key.shape[1], torch.float32, seed=99)
    key_gradient = before.clone()
    query_sum = TritonKernels(deterministic).backward(query, key, weighted, logsumexp.float(), key_gradient)
    assert query_sum.dtype == torch.float32
    assert_near(query_sum, p @ key.double(), tolerance * (p @ key.double().abs()))
    added = key_gradient.double() - before.double()
    assert_near(added, p.T @ weighted.double(), tolerance * (p.T @ weighted.double().abs()) + 1e-6 * before.abs())
