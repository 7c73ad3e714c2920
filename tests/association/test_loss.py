"""The loss is the paper's, its laws hold, and its diagnostics count what they say."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.association import Association, cycle_association, cycle_association_pairs, diffuse
from dist_pca.association.options import ClassWeights, Implementation, Similarity
from tests.association.pixels import CLASSES, domain, labels_of, refinements

IMPLEMENTATIONS = ["reference", "blockwise"]
both_similarities = pytest.mark.parametrize("similarity", ["cosine", "kl"])
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
drawn = {"seed": st.integers(0, 1000), "similarity": st.sampled_from(["cosine", "kl"])}


def literal(
    source: torch.Tensor,
    target: torch.Tensor,
    labels: list[int],
    similarity: Similarity,
    *,
    target_classes: torch.Tensor | None = None,
    target_weights: torch.Tensor | None = None,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    class_balanced: bool = False,
    class_weights: ClassWeights = None,
    guide_keys: bool = False,
) -> tuple[float, int]:
    """The formulas as written: one similarity at a time, z-scores with the mean left in, the entropy left in."""
    guide_source, guide_target = guide or (source, target)
    source_keys, target_keys = (guide_source, guide_target) if guide_keys else (source, target)

    def compare(a: torch.Tensor, b: torch.Tensor) -> float:
        if similarity == "cosine":
            return float(a @ b / (a.norm() * b.norm()))
        return -float((a * (torch.log(a + 1e-10) - torch.log(b + 1e-10))).sum())

    def log_probability(row: list[float], best: int) -> float:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((d - mean) ** 2 for d in row) / (len(row) - 1))
        scores = [(d - mean) / (deviation + 1e-10) for d in row]
        return scores[best] - math.log(sum(math.exp(score) for score in scores))

    cycles: dict[int, list[tuple[float, float]]] = {}
    for i, label in enumerate(labels):
        forward = [compare(guide_source[i], t) for t in guide_target]
        match = max(range(len(forward)), key=forward.__getitem__)
        backward = [compare(guide_target[match], s) for s in guide_source]
        returned = max(range(len(backward)), key=backward.__getitem__)
        seen = label if target_classes is None else int(target_classes[match])
        if label != 255 and labels[returned] == label == seen:
            weight = 1.0 if target_weights is None else float(target_weights[match])
            loss = -log_probability([compare(source[i], t) for t in target_keys], match)
            loss -= log_probability([compare(target[match], s) for s in source_keys], returned)
            cycles.setdefault(label, []).append((weight, loss))

    def mean(weighted: list[tuple[float, float]]) -> float:
        return sum(w * loss for w, loss in weighted) / sum(w for w, _ in weighted)

    classes = {label: of_class for label, of_class in cycles.items() if sum(w for w, _ in of_class) > 0}
    everything = [cycle for of_class in classes.values() for cycle in of_class]
    kept = sum(map(len, cycles.values()))
    if not classes:
        return 0.0, kept
    if not class_balanced:
        return mean(everything), kept
    share = {label: sum(w for w, _ in cycles[label]) / labels.count(label) for label in classes}
    of_classes = share if class_weights == "kept_share" else dict(enumerate(class_weights or [1.0] * CLASSES))
    return mean([(of_classes[label], mean(of_class)) for label, of_class in classes.items()]), kept


@both_similarities
@every_implementation
def test_loss_is_the_papers_formula_taken_literally(similarity: Similarity, implementation: Implementation) -> None:
    source, target = domain(23, 7, similarity, 0), domain(17, 7, similarity, 1)
    labels = labels_of(23, 0)
    found = cycle_association(
        source, target, labels, similarity=similarity, num_classes=3, implementation=implementation
    )
    loss, kept = literal(source, target, labels.tolist(), similarity)
    assert int(found.kept) == kept > 0
    assert float(found.loss) == pytest.approx(loss, rel=1e-9)


@both_similarities
@every_implementation
@pytest.mark.parametrize(
    "balance",
    [
        {},
        *({"class_balanced": True, "class_weights": weights} for weights in (None, "kept_share", (0.5, 2.0, 1.0))),
    ],
)
@pytest.mark.parametrize("guide_keys", [None, False, True])
def test_refined_loss_is_its_formula_taken_literally(
    similarity: Similarity, implementation: Implementation, balance: dict[str, Any], guide_keys: bool | None
) -> None:
    source, target = domain(40, 7, similarity, 0), domain(30, 7, similarity, 1)
    options = refinements(40, 30, 7, similarity, 2, weights=True, guide=guide_keys is not None)
    options |= {**balance, "guide_keys": bool(guide_keys)}
    # With two classes enough cycles pass both of their tests.
    labels, options["target_classes"] = labels_of(40, 0, 2), labels_of(30, 4, 2)
    loss, kept = literal(source, target, labels.tolist(), similarity, **options)
    found = cycle_association(
        source, target, labels, similarity=similarity, num_classes=3, implementation=implementation, **options
    )
    assert int(found.kept) == kept > 2
    assert found.kept_per_class[:2].all()
    assert float(found.loss) == pytest.approx(loss, rel=1e-9)


def gradients(source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    source, target = (x.clone().requires_grad_() for x in (source, target))
    loss = cycle_association(source, target, labels, num_classes=CLASSES, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, (source, target))]


@settings(max_examples=30)
@given(**drawn, weight=st.floats(0.01, 100), class_balanced=st.booleans())
def test_equal_weights_and_a_guide_that_is_the_input_change_nothing(
    seed: int, similarity: Similarity, weight: float, class_balanced: bool
) -> None:
    source, target, labels = domain(30, 6, similarity, seed), domain(20, 6, similarity, seed + 1), labels_of(30, seed)
    options: dict[str, Any] = {"similarity": similarity, "class_balanced": class_balanced}
    plain = gradients(source, target, labels, **options)
    for refinement in (
        {"target_weights": torch.full((20,), weight, dtype=torch.float64)},
        {"guide": (source, target)},
    ):
        torch.testing.assert_close(gradients(source, target, labels, **options, **refinement), plain)


@settings(max_examples=30)
@given(**drawn)
def test_weights_of_ones_are_the_same_bits_as_none(seed: int, similarity: Similarity) -> None:
    source, target, labels = domain(30, 6, similarity, seed), domain(20, 6, similarity, seed + 1), labels_of(30, seed)
    plain = gradients(source, target, labels, similarity=similarity)
    ones = gradients(source, target, labels, similarity=similarity, target_weights=torch.ones(20))
    assert all(torch.equal(a, b) for a, b in zip(plain, ones, strict=True))


@settings(max_examples=30)
@given(**drawn, times=st.integers(2, 4))
def test_more_of_one_class_does_not_move_the_class_balanced_mean(seed: int, similarity: Similarity, times: int) -> None:
    common, rare = (
        (domain(12, 5, similarity, seed + k), domain(9, 5, similarity, seed + 7 + k), torch.full((12,), k))
        for k in (0, 1)
    )

    def loss(repeated: int, class_balanced: bool) -> torch.Tensor:
        sources, targets, labels = zip(*[common] * repeated, rare, strict=True)
        return cycle_association_pairs(
            sources, targets, labels, similarity=similarity, num_classes=3, class_balanced=class_balanced
        ).loss

    torch.testing.assert_close(loss(times, True), loss(1, True))
    assert not torch.isclose(loss(times, False), loss(1, False))


@settings(max_examples=30)
@given(**drawn, factor=st.floats(0.01, 100))
def test_only_ratios_of_class_weights_matter_and_a_class_of_weight_zero_takes_no_gradient(
    seed: int, similarity: Similarity, factor: float
) -> None:
    source, target, labels = domain(30, 6, similarity, seed), domain(20, 6, similarity, seed + 1), labels_of(30, seed)
    balanced = partial(gradients, source, target, labels, similarity=similarity, class_balanced=True)
    plain = balanced()
    torch.testing.assert_close(balanced(class_weights=(factor,) * CLASSES), plain)
    # Pixels without a label are candidates too, so the cycles of class 1 are the same.
    alone = gradients(source, target, torch.where(labels == 1, 1, 255), similarity=similarity, class_balanced=True)
    weights = tuple(float(k == 1) for k in range(CLASSES))
    torch.testing.assert_close(balanced(class_weights=weights), alone)


@both_similarities
@every_implementation
def test_keys_of_a_guide_take_no_gradient(similarity: Similarity, implementation: Implementation) -> None:
    source, target, labels = domain(30, 6, similarity, 0), domain(20, 6, similarity, 1), labels_of(30, 0)
    guide_source, guide_target = (x.clone().requires_grad_() for x in (source, target))
    options: dict[str, Any] = {"similarity": similarity, "implementation": implementation}
    options["target_labels"] = torch.arange(20) % CLASSES
    _, keys_too, _ = gradients(source, target, labels, **options)
    source.requires_grad_()
    target.requires_grad_()
    found = cycle_association(
        source, target, labels, num_classes=CLASSES, guide=(guide_source, guide_target), guide_keys=True, **options
    )
    found.loss.backward()
    assert guide_source.grad is guide_target.grad is None
    assert source.grad is not None
    assert target.grad is not None
    # Only source pixels that start a consistent cycle are queries, while every one is a key.
    assert int(source.grad.any(dim=1).sum()) == int(found.kept)
    assert int(keys_too.any(dim=1).sum()) == 30
    assert 0 < int(target.grad.any(dim=1).sum()) <= int(found.kept)


@settings(max_examples=30)
@given(**drawn)
def test_permuting_pixels_changes_nothing(seed: int, similarity: Similarity) -> None:
    source, target = domain(30, 6, similarity, seed), domain(20, 6, similarity, seed + 1)
    labels = labels_of(30, seed)
    rows, columns = torch.randperm(30), torch.randperm(20)
    before = cycle_association(source, target, labels, similarity=similarity, num_classes=CLASSES)
    after = cycle_association(source[rows], target[columns], labels[rows], similarity=similarity, num_classes=CLASSES)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(after.kept_per_class, before.kept_per_class)
    assert float(after.cover_ratio) == pytest.approx(float(before.cover_ratio))


@settings(max_examples=30)
@given(**drawn)
def test_doubling_all_targets_leaves_every_matchs_class_unchanged(seed: int, similarity: Similarity) -> None:
    source, target = domain(30, 6, similarity, seed), domain(20, 6, similarity, seed + 1)
    labels, truth = labels_of(30, seed), labels_of(20, seed + 1)
    once, twice = (
        cycle_association(
            source,
            target.repeat(times, 1),
            labels,
            similarity=similarity,
            num_classes=CLASSES,
            target_labels=truth.repeat(times),
        )
        for times in (1, 2)
    )
    assert torch.equal(twice.kept_per_class, once.kept_per_class)
    assert torch.equal(twice.correct_ratio.nan_to_num(), once.correct_ratio.nan_to_num())


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100))
def test_the_length_of_features_changes_nothing(seed: int, factor: float) -> None:
    source, target = domain(30, 6, "cosine", seed), domain(20, 6, "cosine", seed + 1)
    labels = labels_of(30, seed)
    before = cycle_association(source, target, labels, num_classes=CLASSES).loss
    after = cycle_association(source * factor, target / factor, labels, num_classes=CLASSES).loss
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), constant=st.floats(1e-3, 1))
def test_a_constant_added_to_every_row_of_log_probabilities_changes_nothing(seed: int, constant: float) -> None:
    """Scaling key distributions shifts all their logarithms, so each row of similarities by a constant."""
    source, target = domain(30, 6, "kl", seed), domain(20, 6, "kl", seed + 1)
    labels = labels_of(30, seed)
    before = cycle_association(source, target, labels, similarity="kl", num_classes=CLASSES).loss
    after = cycle_association(source, target * constant, labels, similarity="kl", num_classes=CLASSES).loss
    # Up to the 1e-10 inside the logarithm; the backward queries scale as a whole, which their deviation undoes.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


@both_similarities
@every_implementation
def test_labels_that_are_all_ignored_give_zero_with_a_graph(
    similarity: Similarity, implementation: Implementation
) -> None:
    source, target = (domain(n, 4, similarity, n).requires_grad_() for n in (6, 5))
    found = cycle_association(
        source,
        target,
        torch.full((6,), 255),
        similarity=similarity,
        num_classes=2,
        implementation=implementation,
    )
    found.loss.backward()
    assert float(found.loss.detach()) == 0
    assert source.grad is not None
    assert target.grad is not None
    assert not source.grad.any()
    assert not target.grad.any()
    assert found.mutual_information_bound.isnan()


def test_several_pairs_share_one_mean_over_their_cycles() -> None:
    sources, targets = [domain(n, 5, "cosine", n) for n in (14, 9)], [domain(n, 5, "cosine", n) for n in (8, 11)]
    labels = [labels_of(14, 0), labels_of(9, 1)]
    together = cycle_association_pairs(sources, targets, labels, num_classes=CLASSES)
    alone = [cycle_association(s, t, y, num_classes=CLASSES) for s, t, y in zip(sources, targets, labels, strict=True)]
    expected = sum(found.loss * found.kept for found in alone) / sum(found.kept for found in alone)
    torch.testing.assert_close(together.loss, expected)


def test_diagnostics_count_what_they_say() -> None:
    # Sources 0 and 1 match target 0, which leads back to source 0; source 2 matches target 1, which leads back to it.
    source = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 0.1], [0.0, 1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.01], [0.0, 1.0, 0.01], [0.1, 0.1, 1.0], [-1.0, -1.0, 0.0]])
    found = cycle_association(
        source, target, torch.tensor([0, 1, 1]), num_classes=2, target_labels=torch.tensor([0, 0, 255, 255])
    )
    assert int(found.kept) == 2
    assert found.kept_per_class.tolist() == [1, 1]
    assert float(found.cover_ratio) == pytest.approx(2 / 4)
    assert float(found.consistent_ratio) == float(found.kept_ratio) == pytest.approx(2 / 3)
    assert float(found.correct_ratio) == pytest.approx(1 / 3)
    assert float(found.mutual_information_bound) == pytest.approx(math.log(3) + math.log(4) - float(found.loss))
    assert int(found.communication_bytes) == 0
    assert found.confusion.tolist() == [[1, 0], [2, 0]]
    assert found.kept_confusion.tolist() == [[1, 0], [1, 0]]
    assert float(found.kept_correct_ratio) == pytest.approx(1 / 2)


@every_implementation
def test_a_teachers_class_and_weight_decide_which_cycles_count(implementation: Implementation) -> None:
    # Sources 0 and 1 match target 0, source 2 matches target 1, each back to itself or to source 0.
    source = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 0.1], [0.0, 1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.01], [0.0, 1.0, 0.01], [0.1, 0.1, 1.0]])

    def found(classes: list[int], weights: list[float]) -> Association:
        return cycle_association(
            source,
            target,
            torch.tensor([0, 0, 1]),
            num_classes=2,
            target_labels=torch.tensor([0, 0, 0]),
            target_classes=torch.tensor(classes),
            target_weights=torch.tensor(weights),
            implementation=implementation,
        )

    both, first, unsure = found([0, 1, 0], [1, 1, 1]), found([0, 0, 0], [1, 1, 1]), found([255, 1, 0], [1, 1, 1])
    assert [one.kept_per_class.tolist() for one in (both, first, unsure)] == [[2, 1], [2, 0], [0, 1]]
    assert [one.kept_confusion.tolist() for one in (both, unsure)] == [[[2, 0], [1, 0]], [[0, 0], [1, 0]]]
    assert [float(one.consistent_ratio) for one in (both, first, unsure)] == [1, 1, 1]
    assert [float(one.kept_ratio) for one in (both, first, unsure)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert both.confusion.tolist() == unsure.confusion.tolist() == [[2, 0], [1, 0]]
    # A weight of 0 leaves the count and takes the cycle out of the loss.
    weightless = found([0, 1, 0], [0.3, 0, 0.5])
    assert int(weightless.kept) == 3
    torch.testing.assert_close(weightless.loss, first.loss)
    weighted, second = found([0, 1, 0], [3, 1, 0]), found([0, 1, 0], [0, 1, 0])
    torch.testing.assert_close(weighted.loss, (6 * first.loss + second.loss) / 7)
    assert float(weighted.mutual_information_bound) == pytest.approx(2 * math.log(3) - float(weighted.loss), rel=1e-6)
    nothing = found([0, 1, 0], [0, 0, 0])
    assert (int(nothing.kept), float(nothing.loss)) == (3, 0)
    assert nothing.mutual_information_bound.isnan()


def test_without_target_labels_there_is_no_confusion() -> None:
    found = cycle_association(
        domain(9, 4, "cosine", 0), domain(8, 4, "cosine", 1), labels_of(9, 0), num_classes=CLASSES
    )
    assert found.confusion.shape == found.kept_confusion.shape == (CLASSES, CLASSES)
    assert not found.confusion.any()
    assert not found.kept_confusion.any()
    assert found.correct_ratio.isnan()
    assert found.kept_correct_ratio.isnan()


def test_the_value_alone_is_the_value_with_gradients() -> None:
    source, target, labels = domain(30, 6, "cosine", 0), domain(20, 6, "cosine", 1), labels_of(30, 0)
    with_gradients = cycle_association(source.clone().requires_grad_(), target, labels, num_classes=CLASSES).loss
    assert torch.equal(cycle_association(source, target, labels, num_classes=CLASSES).loss, with_gradients.detach())


@pytest.mark.parametrize("given_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_type_of_what_was_given(given_dtype: torch.dtype) -> None:
    source = domain(12, 6, "cosine", 0).to(given_dtype).requires_grad_()
    cycle_association(
        source, domain(9, 6, "cosine", 1).to(given_dtype), labels_of(12, 0), num_classes=CLASSES
    ).loss.backward()
    assert source.grad is not None
    assert source.grad.dtype == given_dtype


@both_similarities
def test_autocast_around_it_changes_nothing(similarity: Similarity) -> None:
    source, target = domain(30, 8, similarity, 0).float(), domain(20, 8, similarity, 1).float()
    labels = labels_of(30, 0)

    def loss() -> torch.Tensor:
        diffused = diffuse(target[None], 0.5, similarity)[0]
        return cycle_association(source, diffused, labels, similarity=similarity, num_classes=CLASSES).loss

    outside = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(), outside)
