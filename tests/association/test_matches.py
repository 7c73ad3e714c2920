"""The matches that are found on their own are those of the loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.association import find_matches
from dist_pca.association.method import QueriesAndKeys, cycle_likelihoods, keys, normalised
from dist_pca.association.options import Similarity
from tests.association.pixels import domain


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    similarity=st.sampled_from(["cosine", "kl"]),
    seed=st.integers(0, 1000),
)
def test_matches_and_ends_are_the_definitions(sizes: tuple[int, int], similarity: Similarity, seed: int) -> None:
    source, target = (domain(n, 5, similarity, seed + place) for place, n in enumerate(sizes))
    found = find_matches(source, target, similarity=similarity)
    rows = [normalised(x, similarity) for x in (source, target)]
    pixels = QueriesAndKeys(rows[0], keys(rows[1], similarity), rows[1], keys(rows[0], similarity))
    defined = cycle_likelihoods(pixels, None, True)
    assert torch.equal(found.targets, defined.match)
    assert torch.equal(found.ends, defined.end)


def test_no_graph_is_made() -> None:
    source, target = (domain(8, 5, "cosine", seed).requires_grad_() for seed in (0, 1))
    assert not any(x.requires_grad for x in find_matches(source, target))


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_autocast_changes_no_match(similarity: Similarity) -> None:
    source, target = (domain(8, 5, similarity, seed).float() for seed in (0, 1))
    plain = find_matches(source, target, similarity=similarity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = find_matches(source, target, similarity=similarity)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
