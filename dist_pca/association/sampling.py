"""Subsampling of an image's pixels, where all of them would be too many; association uses all of them by default."""

import math

import torch


def random_grid(height: int, width: int, budget: int, seed: int) -> torch.Tensor:
    """Sample the pixels where random rows of a grid cross random columns.

    Rows and columns are in the proportion of the grid, so that both directions are thinned alike. All pixels are
    returned if they are within the budget.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        budget: Most pixels to return, 1 or more.
        seed: Seed of the choice.

    Returns:
        int64 [k], indices of the flattened grid in ascending order; k is at most `budget`.
    """
    if height * width <= budget:
        return torch.arange(height * width)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, min(height, budget, round(math.sqrt(budget * height / width))))
    columns = min(width, budget // rows)
    sampled_rows = torch.randperm(height, generator=generator)[:rows].sort().values
    sampled_columns = torch.randperm(width, generator=generator)[:columns].sort().values
    return (sampled_rows[:, None] * width + sampled_columns).flatten()


def class_balanced(labels: torch.Tensor, budget: int, ignore_index: int, seed: int) -> torch.Tensor:
    """Sample labelled pixels at random, the same number of each class as far as there are enough.

    What a rare class leaves of its share goes to the others. All pixels are returned if they are within the budget, or
    if none has a label.

    Args:
        labels: [n] integer labels of an image's pixels.
        budget: Most pixels to return, 1 or more.
        ignore_index: Label of pixels to leave out.
        seed: Seed of the choice.

    Returns:
        int64 [k], indices in ascending order.
    """
    labelled = (labels != ignore_index).nonzero()[:, 0]
    if len(labels) <= budget or len(labelled) == 0:
        return torch.arange(len(labels), device=labels.device)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    shuffled = labelled[order]
    classes = labels[shuffled]
    # Rank of each pixel within its class: all classes' first pixels are taken, then all second ones, and so on.
    by_class = classes.argsort(stable=True)
    rank = torch.empty_like(by_class)
    starts = torch.bincount(classes[by_class].long()).cumsum(0).roll(1)
    starts[0] = 0
    rank[by_class] = torch.arange(len(by_class), device=labels.device) - starts[classes[by_class].long()]
    return shuffled[rank.argsort(stable=True)[:budget]].sort().values
