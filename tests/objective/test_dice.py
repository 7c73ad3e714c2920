"""Soft Dice over labelled pixels and the classes that occur."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.objective.dice import dice_loss


def by_pixel(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The definition, pixel by pixel."""
    probabilities = logits.softmax(1).permute(0, 2, 3, 1).flatten(0, 2).tolist()
    pixels = [(p, y) for p, y in zip(probabilities, labels.flatten().tolist(), strict=True) if y != 255]
    scores = []
    for number in {y for _, y in pixels}:
        overlap = sum(p[number] for p, y in pixels if y == number)
        size = sum(p[number] ** 2 for p, _ in pixels) + sum(y == number for _, y in pixels)
        scores.append(2 * overlap / size)
    return 1 - sum(scores) / len(scores) if scores else 0.0


@settings(max_examples=40)
@given(classes=st.integers(2, 5), edge=st.integers(1, 5), seed=st.integers(0, 1000))
def test_value_is_the_definition(classes: int, edge: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, edge, edge, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes + 1, (2, edge, edge), generator=generator)
    labels[labels == classes] = 255
    assert float(dice_loss(logits, labels)) == pytest.approx(by_pixel(logits, labels), abs=1e-12)


def test_a_perfect_prediction_costs_nothing_and_the_opposite_one() -> None:
    labels = torch.tensor([[[0, 0, 1, 255]]])
    right = torch.tensor([[[[9e3, 9e3, -9e3, -9e3]], [[-9e3, -9e3, 9e3, 9e3]]]])
    assert float(dice_loss(right, labels)) == pytest.approx(0)
    assert float(dice_loss(-right, labels)) == pytest.approx(1)


def test_no_labelled_pixel_gives_zero_with_a_graph() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = dice_loss(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
