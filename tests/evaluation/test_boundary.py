from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.classes import IGNORE_INDEX
from dist_pca.evaluation.boundary import boundary_counts, boundary_distance, boundary_iou

CLASSES = 3


@st.composite
def maps(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))

    def ids(values: list[int]) -> torch.Tensor:
        # Mostly of one value, so that there are interiors.
        drawn = draw(st.lists(st.sampled_from(values), min_size=height * width, max_size=height * width))
        return torch.tensor(drawn, dtype=torch.uint8).reshape(height, width)

    mostly = [0] * 12
    return ids([*mostly, 1, 2]), ids([*mostly, 1, 2, IGNORE_INDEX]), draw(st.sampled_from([0.01, 0.1, 0.25, 0.4]))


def literal_boundary(ids: torch.Tensor, class_index: int, distance: int) -> set[tuple[int, int]]:
    """Pixels of a class with one outside the class or image in the square of 2 * distance + 1 pixels around them."""
    height, width = ids.shape
    members = {place for place in product(range(height), range(width)) if ids[place] == class_index}
    steps = list(product(range(-distance, distance + 1), repeat=2))
    return {(y, x) for y, x in members if any((y + dy, x + dx) not in members for dy, dx in steps)}


@given(maps())
def test_counts_are_those_of_the_sets_of_boundary_pixels(drawn: tuple[torch.Tensor, torch.Tensor, float]) -> None:
    prediction, label, ratio = drawn
    distance = boundary_distance(label.shape[0], label.shape[1], ratio)
    counts = boundary_counts(prediction, label, CLASSES, ratio)
    counted = torch.where(label == IGNORE_INDEX, label, prediction)
    for class_index in range(CLASSES):
        true, predicted = (literal_boundary(ids, class_index, distance) for ids in (label, counted))
        assert counts[:, class_index].tolist() == [len(true), len(predicted), len(true & predicted)]
        score = boundary_iou(counts)[class_index].item()
        if true | predicted:
            assert score == pytest.approx(len(true & predicted) / len(true | predicted))
        else:
            assert score != score


def test_a_prediction_that_is_right_where_there_are_labels_scores_one() -> None:
    label = torch.zeros(20, 20, dtype=torch.uint8)
    label[5:15, 5:15] = 1
    label[8:12] = IGNORE_INDEX
    prediction = label.clone()
    prediction[8:12] = 2
    assert boundary_iou(boundary_counts(prediction, label, 2, 0.05)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("size", "ratio", "distance"), [((1024, 2048), 0.02, 46), ((480, 640), 0.02, 16), ((10, 10), 0.02, 1)]
)
def test_boundaries_are_as_wide_as_a_share_of_the_diagonal_and_one_pixel_at_least(
    size: tuple[int, int], ratio: float, distance: int
) -> None:
    assert boundary_distance(*size, ratio) == distance


def test_an_outline_that_is_off_costs_more_than_in_iou() -> None:
    label, prediction = torch.zeros(2, 100, 100, dtype=torch.uint8).unbind()
    label[20:80, 20:80] = 1
    prediction[22:82, 20:80] = 1
    score = boundary_iou(boundary_counts(prediction, label, 2, 0.02))[1].item()
    # Boundaries 3 pixels wide have 60^2 - 54^2 pixels each; in common are all rows but 2 of the left and right sides,
    # and 1 of 3 rows of the upper and lower ones.
    both = 2 * 3 * 58 + 2 * (60 - 6) * 1
    assert score == pytest.approx(both / (2 * (60**2 - 54**2) - both))
