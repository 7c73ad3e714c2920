"""Compiled kernels at widths and sizes that the interpreter is too slow for."""

import pytest
import torch

from dist_pca.association import triton_launch
from dist_pca.association.tiles import BlockMatch
from dist_pca.association.triton_launch import TritonKernels
from tests.association.kernel_rows import TOLERANCE, TYPES, assert_backward, assert_matches, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not triton_launch.can_run(torch.device("cuda")),
        reason="the GPU is older than Ampere",
    ),
]
SIZES = [(1000, 1531), (4099, 2050)]
"""Queries and keys: no multiple of a block, more of either than of the other."""


def results(deterministic: bool, dtype: torch.dtype, channels: int) -> list[torch.Tensor]:
    query, key, weighted = (rows(n, channels, dtype, seed, 3) for seed, n in enumerate((3000, 2111, 3000)))
    kernels = TritonKernels(deterministic)
    found: BlockMatch = kernels.match(query, key, logsumexp=True)
    assert found.logsumexp is not None
    key_gradient = torch.zeros(2111, channels, device=query.device)
    query_sum = kernels.backward(query, key, weighted, found.logsumexp, key_gradient)
    return [found.logit, found.key_index, found.logsumexp, query_sum, key_gradient]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [11, 19, 64, 100, 256, 331, 512, 1024, 2048])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_matches_and_gradients_are_the_formulas_at_every_width(
    n: int, m: int, channels: int, dtype: torch.dtype
) -> None:
    query, key, weighted = (rows(size, channels, dtype, seed, 5) for seed, size in enumerate((n, m, n)))
    # Sums of so many channels round more often.
    tolerance = 1e-5 * max(1, channels / 256)
    assert_matches(TritonKernels().match(query, key, logsumexp=True), query, key, tolerance)
    assert_backward(query, key, weighted, False, max(TOLERANCE[dtype], tolerance))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [19, 256, 1024, 2048])
def test_deterministic_kernels_agree_bit_by_bit_at_every_width(channels: int, dtype: torch.dtype) -> None:
    first, second = (results(True, dtype, channels) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
def test_deterministic_and_atomic_kernels_differ_by_rounding_alone(dtype: torch.dtype) -> None:
    for one, other in zip(results(True, dtype, 256), results(False, dtype, 256), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=10 * TOLERANCE[dtype], atol=TOLERANCE[dtype])
