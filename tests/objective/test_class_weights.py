"""Weights of classes, given or from pixel counts."""

import math
from typing import Any

import numpy as np
import pytest

from dist_pca.config import CrossEntropyConfig
from dist_pca.errors import UserError
from dist_pca.objective.class_weights import class_weights
from tests.support.shards import CLASSES

COUNTS = [np.array([[90, 10, 0], [50, 0, 0]]), np.array([[0, 40, 10]])]
"""Pixels of road, sky and car in the images of two folders."""


def weights(asked: Any, counts: Any = COUNTS) -> list[float]:
    found = class_weights(CrossEntropyConfig(class_weights=asked), counts, CLASSES)
    assert found is not None
    assert sum(found) / len(found) == pytest.approx(1)
    return [weight / found[0] for weight in found]


def test_without_any_there_are_none() -> None:
    assert class_weights(CrossEntropyConfig(), COUNTS, CLASSES) is None


def test_given_weights_keep_their_ratios() -> None:
    assert weights((1, 2, 0.5)) == pytest.approx([1, 2, 0.5])
    assert weights({"car": 5, "road": 2}) == pytest.approx([1, 0.5, 2.5])


def test_median_frequency_counts_images_in_which_a_class_occurs() -> None:
    frequencies = [140 / 150, 50 / 150, 10 / 50]
    assert weights("median_frequency") == pytest.approx([frequencies[0] / other for other in frequencies])


def test_a_class_without_pixels_does_not_move_the_median() -> None:
    (road, sky, car) = weights("median_frequency", [np.array([[30, 10, 0]])])
    assert sky / road == pytest.approx(3)
    assert math.isfinite(car)


def test_inverse_log_is_the_share_of_all_pixels() -> None:
    expected = [1 / math.log(1.02 + pixels / 200) for pixels in (140, 50, 10)]
    assert weights("inverse_log") == pytest.approx([weight / expected[0] for weight in expected])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((1, 2), "2 weights for 3 classes; give one for each, or a map$"),
        ({"cars": 1}, "no class 'cars'; the nearest is car$"),
        ((0, 0, 0), "every weight is 0"),
        ({"road": 0, "sky": 0, "car": 0}, "every weight is 0"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(asked: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^objective\.cross_entropy\.class_weights: {message}"):
        class_weights(CrossEntropyConfig(class_weights=asked), COUNTS, CLASSES)
