"""A budget of pixels: how many, of which classes, and always the same for a seed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.association.sampling import class_balanced, random_grid


@given(height=st.integers(1, 40), width=st.integers(1, 40), budget=st.integers(1, 400), seed=st.integers(0, 99))
def test_a_random_grid_is_whole_rows_and_columns_within_the_budget(
    height: int, width: int, budget: int, seed: int
) -> None:
    picked = random_grid(height, width, budget, seed)
    assert 1 <= len(picked) <= budget
    rows, columns = torch.unique(picked // width), torch.unique(picked % width)
    assert torch.equal(picked, (rows[:, None] * width + columns).flatten())
    assert torch.equal(picked, random_grid(height, width, budget, seed))
    if height * width <= budget:
        assert len(picked) == height * width


def test_a_random_grid_uses_most_of_its_budget_and_keeps_proportions() -> None:
    picked = random_grid(92, 184, 2000, seed=0)
    assert len(picked) > 1900
    assert 0.4 < len(torch.unique(picked // 184)) / len(torch.unique(picked % 184)) < 0.6


@given(counts=st.lists(st.integers(0, 60), min_size=2, max_size=6), budget=st.integers(1, 100), seed=st.integers(0, 99))
def test_class_balanced_pixels_share_the_budget_as_equally_as_there_are_pixels(
    counts: list[int], budget: int, seed: int
) -> None:
    labels = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)] + [torch.full((30,), 255)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    picked = class_balanced(labels, budget, 255, seed)
    assert torch.equal(picked, class_balanced(labels, budget, 255, seed))
    if len(labels) <= budget or not any(counts):
        assert len(picked) == len(labels)
        return
    taken = torch.bincount(labels[picked], minlength=len(counts))
    assert len(taken) == len(counts)
    assert len(picked) == min(budget, sum(counts))
    most = int(taken.max())
    # Whoever has less than the most, give or take one, has given all there is.
    assert all(int(t) >= most - 1 or int(t) == count for t, count in zip(taken, counts, strict=True))


def test_other_seeds_pick_other_pixels() -> None:
    labels = torch.zeros(500, dtype=torch.int64)
    assert not torch.equal(class_balanced(labels, 50, 255, 0), class_balanced(labels, 50, 255, 1))
    assert not torch.equal(random_grid(30, 30, 50, 0), random_grid(30, 30, 50, 1))
