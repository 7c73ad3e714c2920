"""Means over the elements of all ranks."""

import pytest
import torch

from dist_pca.objective.reduction import world_mean


@pytest.mark.parametrize(("total", "count", "mean"), [(6.0, 3, 2.0), (0.5, 0.25, 2.0), (0.0, 0, 0.0)])
def test_a_mean_is_the_total_over_the_count_and_0_of_nothing(total: float, count: float, mean: float) -> None:
    assert float(world_mean(torch.tensor(total), torch.tensor(count))) == mean
