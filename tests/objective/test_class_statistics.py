"""Class statistics: their formula, the bound that they give, and the same on any number of ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.objective.class_statistics import ClassStatistics, class_contrast
from tests.support.ranks import run_on_ranks

CLASSES, CHANNELS = 4, 6


def pixels(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    labels[::5] = 255
    return torch.randn(count, CHANNELS, generator=generator) + 2.0, labels


def updated(*batches: tuple[torch.Tensor, torch.Tensor], decay: float = 0.75) -> ClassStatistics:
    statistics = ClassStatistics()
    for features, labels in batches:
        statistics.update(features, labels, CLASSES, decay=decay)
    return statistics


def test_the_first_batch_gives_mean_and_variance_and_later_ones_move_them() -> None:
    first, second = pixels(40, 0), pixels(40, 1)
    # Class 2 is not in the second batch, and class 3 in neither.
    for labels in (first[1], second[1]):
        labels[labels == 3] = 255
    second[1][second[1] == 2] = 255
    once, twice = updated(first), updated(first, second)
    for label in (0, 1, 2):
        own = F.normalize(first[0], dim=1)[first[1] == label]
        torch.testing.assert_close(once.mean[label], own.mean(dim=0))
        torch.testing.assert_close(once.variance[label], own.var(dim=0, unbiased=False), atol=1e-7, rtol=1e-5)
        others = F.normalize(second[0], dim=1)[second[1] == label]
        expected = 0.75 * own.mean(dim=0) + 0.25 * others.mean(dim=0) if len(others) else own.mean(dim=0)
        torch.testing.assert_close(twice.mean[label], expected)
    assert twice.seen.tolist() == [True, True, True, False]


@settings(max_examples=25)
@given(temperature=st.sampled_from([0.07, 0.1, 1.0]), seed=st.integers(0, 1000), missing=st.integers(0, CLASSES - 1))
def test_the_loss_is_the_formula_over_classes_that_were_seen(temperature: float, seed: int, missing: int) -> None:
    features, labels = pixels(20, seed)
    others, known = pixels(30, seed + 1)
    known[known == missing] = 255
    statistics = updated((others, known))
    losses = []
    for z, label in zip(F.normalize(features, dim=1).tolist(), labels.tolist(), strict=True):
        if label == 255 or not statistics.seen[label]:
            continue
        logits = {}
        for c in range(CLASSES):
            if statistics.seen[c]:
                mean, variance = statistics.mean[c].tolist(), statistics.variance[c].tolist()
                logits[c] = sum(
                    a * m / temperature + a * a * v / (2 * temperature**2)
                    for a, m, v in zip(z, mean, variance, strict=True)
                )
        losses.append(math.log(sum(math.exp(value - logits[label]) for value in logits.values())))
    found = class_contrast(features, labels, statistics, temperature=temperature)
    assert float(found) == pytest.approx(sum(losses) / max(1, len(losses)), rel=1e-4, abs=1e-6)


def test_the_loss_bounds_what_drawn_candidates_cost_on_average() -> None:
    features, labels = pixels(8, 3)
    labels[labels == 255] = 0
    statistics = updated(pixels(200, 4))
    temperature, draws = 0.5, 4000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(draws, CLASSES, CHANNELS, generator=generator)
    candidates = statistics.mean + statistics.variance.sqrt() * noise
    logits = torch.einsum("nc,dkc->dnk", F.normalize(features, dim=1), candidates) / temperature
    # The numerator's expectation is inside the bound's logarithm too (SePiCo, equation 9).
    positive = torch.logsumexp(logits, dim=0)[torch.arange(8), labels] - math.log(draws)
    drawn = (torch.logsumexp(logits, dim=2).mean(dim=0) - positive).mean()
    bound = class_contrast(features, labels, statistics, temperature=temperature)
    assert float(drawn) <= float(bound) <= float(drawn) + 0.1


def test_without_a_labelled_pixel_the_loss_is_0_with_a_graph() -> None:
    features = pixels(6, 0)[0].requires_grad_()
    loss = class_contrast(features, torch.full((6,), 255), updated(pixels(30, 1)), temperature=0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert features.grad is not None
    assert not features.grad.any()


def on_rank(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    statistics, outcome = ClassStatistics(), dict[str, torch.Tensor]()
    for step in range(3):
        features, labels = pixels(60, step)
        # Ranks have different numbers of pixels, and one of them has none of class 1.
        own = slice(0, 20) if rank == 0 else slice(20, 60)
        if ranks == 1:
            own = slice(0, 60)
        labels[:20][labels[:20] == 1] = 255
        mine = features[own].clone().requires_grad_()
        statistics.update(mine, labels[own], CLASSES, decay=0.9)
        loss = class_contrast(mine, labels[own], statistics, temperature=0.1)
        loss.backward()
        assert mine.grad is not None
        outcome = {**vars(statistics), "gradient": mine.grad, "loss": loss.detach()}
    return outcome


def test_two_ranks_have_the_statistics_and_gradients_of_one(tmp_path: Path) -> None:
    one = on_rank(0, 1)
    first, second = run_on_ranks(on_rank, 2, tmp_path)
    for name in ("seen", "mean", "variance"):
        torch.testing.assert_close(first[name], one[name], atol=1e-7, rtol=1e-6)
        assert torch.equal(first[name], second[name])
    # Ranks' gradients are averaged.
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]) / 2, one["gradient"])
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"])
