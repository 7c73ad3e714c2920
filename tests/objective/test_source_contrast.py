"""Contrast of the source's pixels: its formula, the pixels it draws, and the same on any number of ranks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.objective.source_contrast import last_turns, source_contrast
from tests.support.ranks import run_on_ranks

CLASSES, GRID = 4, (5, 6)
SEEDS: Sequence[int] = (11, 12, 13, 14)


def crops(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 3, *GRID, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES + 1, (count, GRID[0] * GRID[1]), generator=generator)
    labels[labels == CLASSES] = 255
    return features, labels


def naive(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """Wang et al. 2021, equation 3, on all labelled pixels, one pair after the other."""
    pixels = [(f / f.norm(), int(label)) for f, label in zip(features, labels, strict=True) if label != 255]
    losses = []
    for i, (anchor, label) in enumerate(pixels):
        cosines = [(float(anchor @ other) / temperature, its) for j, (other, its) in enumerate(pixels) if j != i]
        positives = [s for s, its in cosines if its == label]
        negatives = sum(math.exp(s) for s, its in cosines if its != label)
        if positives and negatives:
            terms = [-math.log(math.exp(s) / (math.exp(s) + negatives)) for s in positives]
            losses.append(sum(terms) / len(terms))
    return sum(losses) / max(1, len(losses))


@settings(max_examples=30)
@given(
    labels=st.lists(st.sampled_from([0, 1, 2, 255]), min_size=12, max_size=12),
    temperature=st.sampled_from([0.07, 0.1, 1.0]),
)
def test_it_is_the_formula_where_all_pixels_are_drawn(labels: list[int], temperature: float) -> None:
    features = crops(1)[0][..., :2, :6]
    (values,) = features.flatten(2).mT
    found = source_contrast(features, torch.tensor([labels]), [3], temperature=temperature, anchors=100)
    assert float(found) == pytest.approx(naive(values, torch.tensor(labels), temperature), rel=1e-9, abs=1e-12)


def test_so_many_pixels_of_each_class_take_part_in_all_images_together() -> None:
    features, labels = crops(4)
    features.requires_grad_()
    source_contrast(features, labels, SEEDS, temperature=0.1, anchors=7).backward()
    assert features.grad is not None
    taking_part = features.grad.abs().sum(dim=1).flatten(1) > 0
    assert torch.bincount(labels[taking_part]).tolist() == [7] * CLASSES
    # They come from more than one image.
    assert (taking_part.sum(dim=1) > 0).sum() > 1


def test_pixels_follow_from_the_seeds_of_crops_and_not_from_their_order() -> None:
    features, labels = crops(4)
    one, other = (
        source_contrast(features[order], labels[order], [SEEDS[place] for place in order], temperature=0.1, anchors=5)
        for order in ([0, 1, 2, 3], [2, 0, 3, 1])
    )
    torch.testing.assert_close(one, other)
    others = source_contrast(features, labels, [seed + 10 for seed in SEEDS], temperature=0.1, anchors=5)
    assert float(others) != pytest.approx(float(one), rel=1e-6)


@pytest.mark.parametrize("classes", [[255] * 30, [2] * 30, [255] * 28 + [0, 1]])
def test_without_two_pixels_of_a_class_and_one_of_another_it_is_nothing_with_a_graph(classes: list[int]) -> None:
    features = crops(1)[0].requires_grad_()
    loss = source_contrast(features, torch.tensor([classes]), [0], temperature=0.1, anchors=100)
    loss.backward()
    assert float(loss.detach()) == 0
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() == 0


def test_descending_it_separates_classes() -> None:
    torch.manual_seed(0)
    labels = torch.arange(30).remainder(3)[None]
    features = torch.nn.Parameter(torch.randn(1, 8, *GRID))
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        source_contrast(features, labels, [1], temperature=0.1, anchors=100).backward()
        optimizer.step()
    pixels = torch.nn.functional.normalize(features.detach().flatten(2).mT[0], dim=1)
    cosines = pixels @ pixels.T
    same = labels.mT == labels
    assert cosines[same].min() > cosines[~same].max()


@given(
    pixels=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=40, unique_by=lambda pixel: pixel[1]),
    shift=st.integers(0, 56),
    count=st.integers(1, 12),
)
def test_the_last_turn_of_those_drawn_is_found_from_counts_of_its_digits(
    pixels: list[tuple[int, int]], shift: int, count: int
) -> None:
    classes, turns = (torch.tensor([pixel[i] for pixel in pixels], dtype=torch.int64) for i in (0, 1))
    turns = (turns << shift) + 5
    last = last_turns(classes, turns, 3, count)
    for label in range(3):
        drawn = turns[(classes == label) & (turns <= last[label])]
        assert drawn.sort().values.tolist() == turns[classes == label].sort().values[:count].tolist()


def of_rank(rank: int, ranks: int, anchors: int) -> dict[str, Any]:
    features, labels = crops(4)
    # One rank of two has no pixel of class 0, one of three no labelled pixel at all.
    labels[2:][labels[2:] == 0] = 255
    labels[3:] = 255
    share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    own = features[share].clone().requires_grad_()
    loss = source_contrast(own, labels[share], SEEDS[share], temperature=0.1, anchors=anchors)
    loss.backward()
    assert own.grad is not None
    # Engines average gradients over ranks.
    return {"loss": loss.detach() / ranks, "gradient": own.grad / ranks}


@pytest.mark.parametrize(("ranks", "anchors"), [(2, 6), pytest.param(3, 100, marks=pytest.mark.slow)])
def test_ranks_are_one_process_on_all_crops(tmp_path: Path, ranks: int, anchors: int) -> None:
    expected = of_rank(0, 1, anchors)
    found = run_on_ranks(of_rank, ranks, tmp_path, anchors)
    torch.testing.assert_close(sum(rank["loss"] for rank in found), expected["loss"])
    torch.testing.assert_close(torch.cat([rank["gradient"] for rank in found]), expected["gradient"])
