"""Inputs that do not fit are refused by name."""

import math
from typing import Any

import pytest
import torch

from dist_pca.association import cycle_association, cycle_association_pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.ones(3, 5)}, r"source \[3, 4\] and target \[3, 5\] must be \[n, C\] with the same C"),
        ({"source": torch.ones(3)}, r"must be \[n, C\]"),
        ({"labels": torch.zeros(2)}, r"labels \[2\] must be \[3\]"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels range from 0 to 2; they must be 0 to 1, or 255"),
        ({"labels": torch.tensor([0, 1, -1])}, "labels range from -1 to 1"),
        ({"target_labels": torch.tensor([0, 1, 7])}, "target_labels range from 0 to 7"),
        ({"target_labels": torch.zeros(4)}, r"target_labels \[4\] must be \[3\]"),
        ({"source": torch.full((3, 4), torch.nan)}, "source has 12 values that are NaN or infinite"),
        ({"target": torch.full((3, 4), torch.inf)}, "target has 12 values that are NaN or infinite"),
        ({"target": torch.ones(0, 4)}, "has a candidate set without pixels"),
        ({"target_classes": torch.tensor([0, 1, 7])}, "target_classes range from 0 to 7"),
        ({"target_weights": torch.ones(3, 1)}, r"target_weights \[-1\] must be \[3\]"),
        ({"target_weights": torch.tensor([1, -1, torch.nan])}, "target_weights has 2 values that are negative, NaN or"),
        ({"guide": (torch.ones(3, 2), torch.ones(3, 5))}, r"guide target \[3, 5\] must be \[n, C'\] with the same C'"),
        ({"guide": (torch.ones(3), torch.ones(3, 5))}, r"must be \[n, C'\] with the same C'"),
        ({"guide": (torch.ones(2, 5), torch.ones(3, 5))}, r"guide source \[2, 5\] must be \[3, 5\]"),
        ({"guide_keys": True}, "guide_keys needs a guide"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {"source": torch.ones(3, 4), "target": torch.ones(3, 4), "labels": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        cycle_association(**(fitting | change), num_classes=2)


def test_pairs_that_do_not_fit_are_named() -> None:
    a, b, labels = torch.ones(3, 4), torch.ones(2, 4), torch.zeros(5)
    with pytest.raises(ValueError, match="labels must have as many rows as source in every pair"):
        cycle_association_pairs([a, b], [a, a], [labels[:2], labels[:3]], num_classes=2)
    with pytest.raises(ValueError, match="source has 2 images and target 1; they must be as many"):
        cycle_association_pairs([a, b], [a], [labels[:3], labels[:2]], num_classes=2)
    with pytest.raises(ValueError, match="target_weights must have as many rows as target in every pair"):
        cycle_association_pairs([a, b], [a, b], [labels[:3], labels[:2]], target_weights=[torch.ones(5)], num_classes=2)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"class_weights": "kept_share"}, "class_weights needs class_balanced"),
        *(
            ({"class_balanced": True, "class_weights": weights}, "class_weights must be 3 finite numbers of 0 or more")
            for weights in ((1.0,), (1.0, -1.0, 1.0), (1.0, math.inf, 1.0), (1.0, math.nan, 1.0))
        ),
    ],
)
def test_wrong_class_weights_are_an_error(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        cycle_association(torch.eye(3), torch.eye(3), torch.arange(3), num_classes=3, **options)
