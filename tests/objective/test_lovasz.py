import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.objective.lovasz import lovasz_softmax


def brute_force(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The Lovasz extension as its definition has it: each error times the growth of the Jaccard loss."""
    losses = []
    for c in labels[labels != 255].unique().tolist():
        pixels = [
            (abs(float(y == c) - float(p[c])), int(y) == c)
            for p, y in zip(probabilities, labels, strict=True)
            if y != 255
        ]
        pixels.sort(key=lambda pixel: -pixel[0])
        in_class = sum(member for _, member in pixels)
        missed = false = 0
        previous = loss = 0.0
        for error, member in pixels:
            missed, false = missed + member, false + (not member)
            jaccard = 1 - (in_class - missed) / (in_class + false)
            loss += error * (jaccard - previous)
            previous = jaccard
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=40)
@given(pixels=st.integers(1, 30), classes=st.integers(2, 5), seed=st.integers(0, 1000))
def test_value_is_the_definition(pixels: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(pixels, classes, generator=generator, dtype=torch.float64).softmax(dim=1)
    labels = torch.randint(0, classes + 1, (pixels,), generator=generator)
    labels[labels == classes] = 255
    assert float(lovasz_softmax(probabilities, labels)) == pytest.approx(brute_force(probabilities, labels), abs=1e-12)


def test_a_perfect_prediction_costs_nothing_and_the_opposite_one() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    perfect = torch.nn.functional.one_hot(labels, 2).double()
    assert float(lovasz_softmax(perfect, labels)) == 0
    assert float(lovasz_softmax(1 - perfect, labels)) == 1


def test_no_labelled_pixel_gives_zero_with_a_graph() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = lovasz_softmax(logits.softmax(dim=1), torch.full((4,), 255))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
