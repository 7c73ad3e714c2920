from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.objective.lovasz import CPU_BLOCK_PIXELS, lovasz_softmax
from tests.support.ranks import run_on_ranks


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


def some_pixels(pixels: int, classes: int, seed: int, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, fp64 [P, K], and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(pixels, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes + 1, (pixels,), generator=generator)
    labels[labels == classes] = 255
    return logits.softmax(dim=1), labels


def with_gradient(probabilities: torch.Tensor, labels: torch.Tensor, **how: Any) -> tuple[float, torch.Tensor]:
    leaf = probabilities.clone().requires_grad_()
    loss = lovasz_softmax(leaf, labels, **how)
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


@settings(max_examples=40)
@given(pixels=st.integers(1, 30), classes=st.integers(2, 5), seed=st.integers(0, 1000))
def test_value_is_the_definition(pixels: int, classes: int, seed: int) -> None:
    probabilities, labels = some_pixels(pixels, classes, seed)
    assert float(lovasz_softmax(probabilities, labels)) == pytest.approx(brute_force(probabilities, labels), abs=1e-12)


def test_a_perfect_prediction_costs_nothing_and_the_opposite_one() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    perfect = torch.nn.functional.one_hot(labels, 2).double()
    assert float(lovasz_softmax(perfect, labels)) == 0
    assert float(lovasz_softmax(1 - perfect, labels)) == 1


@pytest.mark.parametrize("bins", [None, 16])
def test_no_labelled_pixel_gives_zero_with_a_graph(bins: int | None) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = lovasz_softmax(logits.softmax(dim=1), torch.full((4,), 255), bins=bins)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


PIXELS = {
    "pixels": st.integers(1, 60),
    "classes": st.integers(1, 5),
    "bins": st.integers(1, 40),
    "seed": st.integers(0, 1000),
    "sharpness": st.sampled_from([0.1, 1.0, 10.0]),
}


@given(**PIXELS)
def test_counted_errors_give_the_loss_from_below_to_within_the_width_of_a_bin(
    pixels: int, classes: int, bins: int, seed: int, sharpness: float
) -> None:
    probabilities, labels = some_pixels(pixels, classes, seed, sharpness)
    exact, counted = (float(lovasz_softmax(probabilities, labels, bins=how)) for how in (None, bins))
    assert -1e-12 <= exact - counted <= 1 / bins + 1e-12


@given(**PIXELS)
def test_the_gradient_of_counted_errors_is_a_subgradient_to_within_the_width_of_a_bin(
    pixels: int, classes: int, bins: int, seed: int, sharpness: float
) -> None:
    here, labels = some_pixels(pixels, classes, seed, sharpness)
    there, _ = some_pixels(pixels, classes, seed + 1, sharpness)
    _, gradient = with_gradient(here, labels, bins=bins)
    below = float(lovasz_softmax(here, labels)) + float((gradient * (there - here)).sum()) - 1 / bins
    assert float(lovasz_softmax(there, labels)) >= below - 1e-12


@given(**PIXELS)
def test_counted_errors_are_exact_where_those_of_a_bin_are_equal(
    pixels: int, classes: int, bins: int, seed: int, sharpness: float
) -> None:
    probabilities, labels = some_pixels(pixels, classes, seed, sharpness)
    other, _ = some_pixels(pixels, classes, seed + 1, sharpness)
    # Errors of 1 - p and of p are both in the middle of a bin. The simplex plays no part.
    here, there = (((values * bins).floor().clamp(max=bins - 1) + 0.5) / bins for values in (probabilities, other))
    loss, gradient = with_gradient(here, labels, bins=bins)
    assert loss == pytest.approx(brute_force(here, labels), abs=1e-12)
    assert brute_force(there, labels) >= loss + float((gradient * (there - here)).sum()) - 1e-12


def test_fine_bins_give_the_gradient_of_the_sorted_errors() -> None:
    probabilities, labels = some_pixels(CPU_BLOCK_PIXELS + 5000, 3, seed=0, sharpness=3)
    (exact, expected), (loss, gradient) = (with_gradient(probabilities, labels, bins=bins) for bins in (None, 2**16))
    assert loss == pytest.approx(exact, abs=1e-7)
    assert float((gradient - expected).norm() / expected.norm()) < 0.02


SHARES = (40, 0, 25)
"""Pixels of each rank: ranks need not have equally many, nor any."""
NODES = ((0, 1), (2,))


def losses_on_rank(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    groups = [dist.new_group(list(ranks)) for ranks in NODES]
    probabilities, labels = some_pixels(sum(SHARES), 4, seed=0)
    mine, mine_labelled = probabilities.to(dtype).split(SHARES)[rank], labels.split(SHARES)[rank]
    return {
        f"{scope} {bins}": with_gradient(
            mine,
            mine_labelled,
            bins=bins,
            over_ranks=scope != "rank",
            group=groups[rank // 2] if scope == "node" else None,
        )
        for scope in ("rank", "node", "world")
        for bins in (None, 8)
    }


def test_ranks_of_a_scope_have_the_loss_and_gradient_of_one_process(tmp_path: Path) -> None:
    found = run_on_ranks(losses_on_rank, len(SHARES), tmp_path, torch.float32)
    probabilities, labels = some_pixels(sum(SHARES), 4, seed=0)
    starts = [sum(SHARES[:rank]) for rank in range(len(SHARES))]
    scopes = {"rank": [(0,), (1,), (2,)], "node": NODES, "world": [(0, 1, 2)]}
    for scope, sets in scopes.items():
        for bins in (None, 8):
            for ranks in sets:
                pixels = slice(starts[ranks[0]], starts[ranks[-1]] + SHARES[ranks[-1]])
                expected, gradient = with_gradient(probabilities[pixels].float(), labels[pixels], bins=bins)
                results = [found[rank][f"{scope} {bins}"] for rank in ranks]
                # Gradients are averaged over ranks.
                assert sum(loss for loss, _ in results) / len(ranks) == pytest.approx(expected, rel=1e-5)
                ours = torch.cat([gradient for _, gradient in results]) / len(ranks)
                torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-7)
