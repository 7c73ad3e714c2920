"""A budget of positions per image, for pools that would be too large. Association is over all positions without it."""

import math

import torch


def random_grid(height: int, width: int, budget: int, seed: int) -> torch.Tensor:
    """Positions where random rows of a grid cross random columns, int64 [k], ascending, k at most `budget`.

    As many rows to columns as the grid has, so that both directions are thinned alike. All positions if they are within
    the budget.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        budget: Most positions, from 1.
        seed: Same seed, same positions.
    """
    if height * width <= budget:
        return torch.arange(height * width)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, min(height, budget, round(math.sqrt(budget * height / width))))
    columns = min(width, budget // rows)
    picked_rows = torch.randperm(height, generator=generator)[:rows].sort().values
    picked_columns = torch.randperm(width, generator=generator)[:columns].sort().values
    return (picked_rows[:, None] * width + picked_columns).flatten()


def class_balanced(labels: torch.Tensor, budget: int, ignore_index: int, seed: int) -> torch.Tensor:
    """Random labelled positions, int64 [k], ascending, as many of each class as there are, up to equal shares.

    What a rare class leaves of its share goes to the others. All positions if they are within the budget, or if none
    has a label.

    Args:
        labels: [n] integer labels of an image's positions.
        budget: Most positions, from 1.
        ignore_index: Label of positions that are left out.
        seed: Same seed, same positions.
    """
    labelled = (labels != ignore_index).nonzero()[:, 0]
    if len(labels) <= budget or len(labelled) == 0:
        return torch.arange(len(labels), device=labels.device)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    shuffled = labelled[order]
    classes = labels[shuffled]
    # A position's turn is its place among those of its class: all classes' first ones, then all second ones, and so on.
    by_class = classes.argsort(stable=True)
    turn = torch.empty_like(by_class)
    starts = torch.bincount(classes[by_class].long()).cumsum(0).roll(1)
    starts[0] = 0
    turn[by_class] = torch.arange(len(by_class), device=labels.device) - starts[classes[by_class].long()]
    return shuffled[turn.argsort(stable=True)[:budget]].sort().values
