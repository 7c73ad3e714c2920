"""Both implementations of the cycles are the paper's formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.association import associate, blockwise, diffuse, reference
from dist_pca.association.similarity import Similarity, keys, normalised

IMPLEMENTATIONS = [reference.cycles, blockwise.cycles]


def domain(n: int, channels: int, similarity: Similarity, seed: int) -> torch.Tensor:
    rows = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.softmax(dim=1) if similarity == "kl" else rows


def labels_of(n: int, classes: int, seed: int) -> torch.Tensor:
    labels = torch.randint(0, classes + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.where(labels == classes, 255, labels)


def arguments(
    similarity: Similarity, n_source: int, n_target: int, channels: int, classes: int, seed: int
) -> list[torch.Tensor]:
    source, target = (
        normalised(domain(n, channels, similarity, seed + index), similarity)
        for index, n in enumerate((n_source, n_target))
    )
    labels = labels_of(n_source, classes, seed)
    rows = [source, keys(target, similarity), target, keys(source, similarity)]
    return [row.clone().requires_grad_() for row in rows] + [labels, labels]


def literal(source: torch.Tensor, target: torch.Tensor, labels: list[int], similarity: Similarity) -> tuple[float, int]:
    """METHOD as written: one similarity at a time, z-scores with the mean left in, the entropy left in."""

    def compare(a: torch.Tensor, b: torch.Tensor) -> float:
        if similarity == "cosine":
            return float(a @ b / (a.norm() * b.norm()))
        return -float((a * (torch.log(a + 1e-10) - torch.log(b + 1e-10))).sum())

    def log_probability(row: list[float], best: int) -> float:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((d - mean) ** 2 for d in row) / (len(row) - 1))
        scores = [(d - mean) / (deviation + 1e-10) for d in row]
        return scores[best] - math.log(sum(math.exp(score) for score in scores))

    total, kept = 0.0, 0
    for i, label in enumerate(labels):
        forward = [compare(source[i], t) for t in target]
        match = max(range(len(forward)), key=forward.__getitem__)
        backward = [compare(target[match], s) for s in source]
        returned = max(range(len(backward)), key=backward.__getitem__)
        if label != 255 and labels[returned] == label:
            kept += 1
            total -= log_probability(forward, match) + log_probability(backward, returned)
    return total / max(kept, 1), kept


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_loss_is_the_papers_formula_taken_literally(similarity: Similarity, implementation: str) -> None:
    source, target = domain(23, 7, similarity, 0), domain(17, 7, similarity, 1)
    labels = labels_of(23, 3, 0)
    found = associate(source, target, labels, similarity=similarity, num_classes=3, implementation=implementation)  # type: ignore[arg-type]
    loss, kept = literal(source, target, labels.tolist(), similarity)
    assert int(found.kept) == kept > 0
    assert float(found.loss) == pytest.approx(loss, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    similarity=st.sampled_from(["cosine", "kl"]),
    n_source=st.integers(1, 40),
    n_target=st.integers(1, 40),
    channels=st.integers(2, 12),
    detach=st.booleans(),
    seed=st.integers(0, 1000),
    block_bytes=st.sampled_from([1, 700, 1 << 20]),
)
def test_blockwise_equals_reference_whatever_the_block(
    similarity: Similarity, n_source: int, n_target: int, channels: int, detach: bool, seed: int, block_bytes: int
) -> None:
    results = []
    blockwise.BLOCK_BYTES, usual = block_bytes, blockwise.BLOCK_BYTES
    try:
        for cycles in IMPLEMENTATIONS:
            given_rows = arguments(similarity, n_source, n_target, channels, 3, seed)
            found = cycles(*given_rows, 255, detach)
            found.loss_sum.backward()
            results.append((found, [row.grad for row in given_rows[:4]]))
    finally:
        blockwise.BLOCK_BYTES = usual
    (expected, expected_gradients), (found, gradients) = results
    assert torch.equal(found.match, expected.match)
    assert torch.equal(found.returned, expected.returned)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-9, atol=1e-9)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        scale = max(1.0, float(expected_gradient.abs().max()))
        torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("cycles", IMPLEMENTATIONS)
def test_gradient_is_that_of_finite_differences(similarity: Similarity, cycles) -> None:  # type: ignore[no-untyped-def]
    *rows, labels, pool_labels = arguments(similarity, 9, 8, 5, 2, seed=3)
    assert torch.autograd.gradcheck(lambda *r: cycles(*r, labels, pool_labels, 255, False).loss_sum, rows)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_no_kept_cycle_gives_zero_with_a_graph(implementation: str) -> None:
    source, target = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    found = associate(source, target, torch.full((6,), 255), num_classes=2, implementation=implementation)  # type: ignore[arg-type]
    found.loss.backward()
    assert float(found.loss.detach()) == 0
    assert source.grad is not None
    assert not source.grad.any()
    assert not target.grad.any()  # type: ignore[union-attr]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), similarity=st.sampled_from(["cosine", "kl"]))
def test_permuting_positions_changes_nothing(seed: int, similarity: Similarity) -> None:
    source, target = domain(30, 6, similarity, seed), domain(20, 6, similarity, seed + 1)
    labels = labels_of(30, 3, seed)
    rows, columns = torch.randperm(30), torch.randperm(20)
    before = associate(source, target, labels, similarity=similarity, num_classes=3)
    after = associate(source[rows], target[columns], labels[rows], similarity=similarity, num_classes=3)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(after.kept_per_class, before.kept_per_class)
    assert float(after.cover_ratio) == pytest.approx(float(before.cover_ratio))


def test_diagnostics_count_what_they_say() -> None:
    # Sources 0 and 1 match target 0, which leads back to source 0; source 2 matches target 1, which leads back to it.
    source = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 0.1], [0.0, 1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.01], [0.0, 1.0, 0.01], [0.1, 0.1, 1.0], [-1.0, -1.0, 0.0]])
    found = associate(
        source, target, torch.tensor([0, 1, 1]), num_classes=2, target_labels=torch.tensor([0, 0, 255, 255])
    )
    assert int(found.kept) == 2
    assert found.kept_per_class.tolist() == [1, 1]
    assert float(found.cover_ratio) == pytest.approx(2 / 4)
    assert float(found.consistent_ratio) == pytest.approx(2 / 3)
    assert float(found.correct_ratio) == pytest.approx(1 / 3)
    assert float(found.nats_over_chance) == pytest.approx(math.log(3) + math.log(4) - float(found.loss))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"source \[3, 4\] and target \[3, 5\]"):
        associate(torch.ones(3, 4), torch.ones(3, 5), torch.zeros(3), num_classes=1)
    with pytest.raises(ValueError, match=r"labels \[2\] must be \[3\]"):
        associate(torch.ones(3, 4), torch.ones(3, 4), torch.zeros(2), num_classes=1)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_autocast_around_it_changes_nothing(similarity: Similarity) -> None:
    source, target = domain(30, 8, similarity, 0).float(), domain(20, 8, similarity, 1).float()
    labels = labels_of(30, 3, 0)

    def loss() -> torch.Tensor:
        diffused = diffuse(target[None], 0.5, similarity)[0]
        return associate(source, diffused, labels, similarity=similarity, num_classes=3).loss

    outside = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(), outside)
