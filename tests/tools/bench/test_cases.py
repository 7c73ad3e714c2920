import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.association import cycle_association
from dist_pca.association.streamed import find_matches
from dist_pca.tools.bench.cases import Case, inputs
from dist_pca.tools.bench.measure import unavoidable_products

CASE = Case(
    implementation="blockwise",
    dtype="fp32",
    n=200,
    channels=16,
    world_size=2,
    communication="gather",
    similarity="cosine",
    data="clustered",
    spread=0.5,
    classes=5,
    seed=3,
    repeats=1,
    max_seconds=10,
    threads=1,
)


def kept_ratio(case: Case) -> float:
    source, target, labels = inputs(case, 0)
    found = cycle_association(source, target, labels, similarity=case.similarity, num_classes=case.classes)
    return float(found.consistent_ratio)


def test_pixels_are_the_same_for_the_same_seed_and_differ_between_ranks_and_domains() -> None:
    once, again, other = inputs(CASE, 0), inputs(CASE, 0), inputs(CASE, 1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
    assert not torch.equal(once[0], once[1])
    assert [tuple(x.shape) for x in once] == [(200, 16), (200, 16), (200,)]


def test_ranks_share_their_class_centres() -> None:
    tight = dataclasses.replace(CASE, spread=0.0)
    ours, theirs = inputs(tight, 0)[0], inputs(tight, 1)[0]
    assert len(torch.unique(ours, dim=0)) == CASE.classes
    assert torch.equal(torch.unique(ours, dim=0), torch.unique(theirs, dim=0))


def test_the_less_spread_the_more_cycles_hold() -> None:
    tight, wide = (kept_ratio(dataclasses.replace(CASE, spread=spread)) for spread in (0.1, 30.0))
    assert tight > wide
    assert tight > 0.6


def test_random_pixels_keep_cycles_that_end_where_they_began_and_by_chance_of_the_rest() -> None:
    case = dataclasses.replace(CASE, data="random", n=2000)
    source, target = (torch.nn.functional.normalize(x, dim=1) for x in inputs(case, 0)[:2])
    product = source @ target.T
    returned = product.argmax(dim=0)[product.argmax(dim=1)]
    home = float((returned == torch.arange(2000)).float().mean())
    assert kept_ratio(case) == pytest.approx(home + (1 - home) / 5, abs=0.03)


@settings(max_examples=20)
@given(kept=st.floats(0, 1), cover=st.floats(0.01, 1), rank=st.integers(0, 1))
def test_given_shares_of_kept_cycles_and_matched_targets_come_out(kept: float, cover: float, rank: int) -> None:
    kept = max(kept, cover)
    case = dataclasses.replace(CASE, data="shares", channels=64, kept=kept, cover=cover)
    source, target, labels = inputs(case, rank)
    found = cycle_association(source, target, labels, num_classes=case.classes)
    assert float(found.consistent_ratio) == pytest.approx(kept, abs=0.03)
    assert float(found.cover_ratio) == pytest.approx(cover, abs=0.03)
    targets, kept = float(found.cover_ratio), float(found.consistent_ratio)
    # Here every matched target has a kept cycle, so that matching back takes fewer products than a second look at rows.
    assert unavoidable_products(case, source, target, labels) == pytest.approx(1 + 2 * kept + 4 * targets, abs=0.01)


def test_where_fewer_cycles_are_kept_than_targets_matched_their_similarities_are_computed_twice() -> None:
    case = dataclasses.replace(CASE, data="random")
    source, target, _ = inputs(case, 0)
    matches, labels = find_matches(source, target), torch.arange(case.n)
    # With labels that differ, those cycles are kept that end where they began, each through a target of its own.
    kept = float((matches.ends == labels).float().mean())
    assert 0 < kept < len(torch.unique(matches.targets)) / case.n
    assert unavoidable_products(case, source, target, labels) == pytest.approx(1 + 6 * kept)


def test_a_target_without_a_kept_cycle_takes_no_product_of_its_own() -> None:
    case = dataclasses.replace(CASE, data="shares", channels=64, kept=1.0, cover=0.5)
    source, target, _ = inputs(case, 0)
    matches = find_matches(source, target)
    # No two pixels of a cycle but the leader itself share a label.
    labels = torch.arange(case.n)
    leaders = float((matches.ends == labels).float().mean())
    assert unavoidable_products(case, source, target, labels) == pytest.approx(1 + 6 * leaders)


def test_pixels_for_kl_are_distributions() -> None:
    source, target, _ = inputs(dataclasses.replace(CASE, similarity="kl"), 0)
    for x in (source, target):
        torch.testing.assert_close(x.sum(dim=1), torch.ones(200))
        assert (x >= 0).all()


@pytest.mark.slow
def test_the_default_spread_gives_the_ratios_of_a_network_in_training() -> None:
    case = dataclasses.replace(CASE, n=8464, channels=256, classes=19, spread=1.5)
    source, target, labels = inputs(case, 0)
    found = cycle_association(source, target, labels, num_classes=19)
    assert float(found.consistent_ratio) == pytest.approx(0.73, abs=0.03)
    assert float(found.cover_ratio) == pytest.approx(0.22, abs=0.03)
