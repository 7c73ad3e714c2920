"""Inputs that do not fit are refused by name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.association import cycle_association, cycle_association_pairs
from tests.support.ranks import run_on_ranks


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


def wrong_on_one_rank(rank: int, ranks: int) -> list[str]:
    messages = []
    for problem in ("nan", "label", "channels", "empty", "argument", "none"):
        source, target, labels = torch.ones(5, 4), torch.ones(6, 4), torch.zeros(5, dtype=torch.int64)
        settings: dict[str, Any] = {"num_classes": 2}
        if rank == 1:
            source = torch.full_like(source, torch.nan) if problem == "nan" else source
            labels = labels + 9 if problem == "label" else labels
            source, target = (torch.ones(5, 3), torch.ones(6, 3)) if problem == "channels" else (source, target)
            target = target[:0] if problem == "empty" else target
            settings["detach_statistics"] = problem != "argument"
        try:
            cycle_association(source, target, labels, **settings)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_wrong_tensor_on_one_rank_is_an_error_on_all_that_names_rank_and_tensor(tmp_path: Path) -> None:
    found = run_on_ranks(wrong_on_one_rank, 2, tmp_path)
    assert found[0] == found[1]
    nan, label, channels, empty, argument, none = found[0]
    assert nan == "rank 1: source has 20 values that are NaN or infinite"
    assert label == "rank 1: labels range from 9 to 9; they must be 0 to 1, or 255"
    assert channels == "rank 1: source [5, 3] has other channels than rank 0, which has 4"
    assert empty.startswith("rank 1: source [5, 4] or target [0, 4] has a candidate set without pixels")
    assert argument == "rank 1: was called with other arguments than rank 0"
    assert none == ""


def a_wrong_refinement_on_one_rank(rank: int, ranks: int) -> dict[str, str]:
    messages = {}
    for problem in (
        "missing", "nan", "negative", "rows", "class", "guide rows", "guide channels", "guide keys", "guide nan",
        "type", "class weights", "none",
    ):  # fmt: skip
        source, target, labels = torch.eye(5, 4) + 1, torch.eye(6, 4) + 1, torch.zeros(5, dtype=torch.int64)
        options: dict[str, Any] = {
            "target_classes": torch.zeros(6, dtype=torch.int64),
            "target_weights": torch.ones(6),
            "guide": (torch.ones(5, 3), torch.ones(6, 3)),
            "guide_keys": problem == "guide keys",
            "class_balanced": True,
        }
        if rank == 1:
            match problem:
                case "missing":
                    del options["target_weights"]
                case "nan":
                    options["target_weights"][:2] = torch.nan
                case "negative":
                    options["target_weights"][0] = -1
                case "rows":
                    options["target_classes"] = torch.zeros(5, dtype=torch.int64)
                case "class":
                    options["target_classes"][0] = 7
                case "guide rows":
                    options["guide"] = torch.ones(5, 3), torch.ones(5, 3)
                case "guide channels":
                    options["guide"] = torch.ones(5, 2), torch.ones(6, 2)
                case "guide nan":
                    options["guide"][0][0] = torch.nan
                case "type":
                    source, target = source.double(), target.double()
                case "class weights":
                    options["class_weights"] = "kept_share"
        try:
            cycle_association(source, target, labels, num_classes=2, **options)
            messages[problem] = ""
        except ValueError as error:
            messages[problem] = str(error)
    return messages


def test_a_wrong_refinement_on_one_rank_is_an_error_on_all_that_names_rank_and_tensor(tmp_path: Path) -> None:
    found = run_on_ranks(a_wrong_refinement_on_one_rank, 2, tmp_path)
    assert found[0] == found[1]
    assert found[0] == {
        "missing": "rank 1: lacks target_weights, unlike rank 0; give it on all ranks or on none",
        "nan": "rank 1: target_weights has 2 values that are negative, NaN or infinite",
        "negative": "rank 1: target_weights has 1 values that are negative, NaN or infinite",
        "rows": "rank 1: target_classes [5] must be [6], one for each target row",
        "class": "rank 1: target_classes range from 0 to 7; they must be 0 to 1, or 255",
        "guide rows": "rank 1: guide target [5, 3] must be [6, 3], one for each target row",
        "guide channels": "rank 1: guide source [5, 2] has other channels than rank 0, which has 3",
        "guide keys": "; ".join(
            f"rank {rank}: guide source [5, 3] must have the 4 channels of source to serve as keys; "
            "give guide_keys=False"
            for rank in (0, 1)
        ),
        "guide nan": "rank 1: guide source has 3 values that are NaN or infinite",
        "type": "rank 1: source [5, 4] and target [6, 4] must both be fp64, or neither, as on rank 0",
        "class weights": "rank 1: was called with other arguments than rank 0",
        "none": "",
    }
