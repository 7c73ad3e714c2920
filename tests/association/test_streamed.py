"""The streamed loss equals the dense definition, whatever the tiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.association import Association, cycle_association, cycle_association_pairs, tiles
from dist_pca.association.options import Implementation, Similarity
from dist_pca.tools.bench.memory import peak_of, return_freed_memory_at_once
from dist_pca.tools.bench.processes import in_fresh_processes
from tests.association.pixels import CLASSES, domain, labels_of, refinements


class Outcome(NamedTuple):
    """A loss with its diagnostics, and the gradients of what it was given."""

    association: Association
    gradients: list[torch.Tensor]


def value_and_gradients(source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, **options: Any) -> Outcome:
    source, target = source.clone().requires_grad_(), target.clone().requires_grad_()
    found = cycle_association(source, target, labels, num_classes=CLASSES, **options)
    found.loss.backward()
    return Outcome(found, [gradient_of(x) for x in (source, target)])


def gradient_of(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


def assert_equal(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert int(found.association.kept) == int(expected.association.kept)
    assert torch.equal(found.association.kept_per_class, expected.association.kept_per_class)
    losses = found.association.loss, expected.association.loss
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance, check_dtype=False)
    for gradient, expected_gradient in zip(found.gradients, expected.gradients, strict=True):
        scale = expected_gradient.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(
            gradient / scale, expected_gradient / scale, rtol=0, atol=10 * tolerance, check_dtype=False
        )


@contextmanager
def tiles_of(height: int, group: int) -> Iterator[None]:
    """Small tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_TILE_BYTES", 1)
        patch.setattr(tiles, "MIN_ROWS", height)
        patch.setattr(tiles, "MAX_GROUP", group)
        yield


@settings(max_examples=80)
@given(
    similarity=st.sampled_from(["cosine", "kl"]),
    n_source=st.integers(1, 60),
    n_target=st.integers(1, 60),
    channels=st.integers(2, 12),
    detach=st.booleans(),
    seed=st.integers(0, 1000),
    height=st.integers(1, 20),
    group=st.integers(1, 8),
    online=st.booleans(),
)
def test_streamed_equals_reference_whatever_the_tiles(
    similarity: Similarity,
    n_source: int,
    n_target: int,
    channels: int,
    detach: bool,
    seed: int,
    height: int,
    group: int,
    online: bool,
) -> None:
    source, target = domain(n_source, channels, similarity, seed), domain(n_target, channels, similarity, seed + 1)
    labels = labels_of(n_source, seed)
    options = {"similarity": similarity, "detach_statistics": detach}
    expected = value_and_gradients(source, target, labels, implementation="reference", **options)
    with tiles_of(height, group):
        implementation = "online_softmax" if online else "blockwise"
        found = value_and_gradients(source, target, labels, implementation=implementation, **options)
    if min(n_source, n_target) > 2:
        assert_equal(found, expected, 1e-8)
    else:
        # With one or two candidates a deviation is zero or rounding, and so are the scores it divides.
        assert int(found.association.kept) == int(expected.association.kept)


@settings(max_examples=80)
@given(
    similarity=st.sampled_from(["cosine", "kl"]),
    sizes=st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40)), min_size=1, max_size=3),
    channels=st.integers(2, 12),
    detach=st.booleans(),
    classes=st.booleans(),
    weights=st.booleans(),
    balanced=st.booleans(),
    guide=st.sampled_from([None, "matches", "keys"]),
    seed=st.integers(0, 1000),
    height=st.integers(1, 20),
    group=st.integers(1, 8),
    online=st.booleans(),
)
def test_refinements_streamed_equal_those_of_the_reference(
    similarity: Similarity,
    sizes: list[tuple[int, int]],
    channels: int,
    detach: bool,
    classes: bool,
    weights: bool,
    balanced: bool,
    guide: str | None,
    seed: int,
    height: int,
    group: int,
    online: bool,
) -> None:
    pairs = [
        (domain(s, channels, similarity, seed + k), domain(t, channels, similarity, seed + 9 + k))
        for k, (s, t) in enumerate(sizes)
    ]
    labels = [labels_of(s, seed + k) for k, (s, _) in enumerate(sizes)]
    # Only where its rows are keys must a guide have as many channels.
    width = channels if guide == "keys" else channels + 1
    drawn = [
        refinements(s, t, width, similarity, seed + k, classes=classes, weights=weights, guide=guide is not None)
        for k, (s, t) in enumerate(sizes)
    ]
    options: dict[str, Any] = {name: [one[name] for one in drawn] for name in drawn[0]}
    if guide is not None:
        options["guide"] = tuple(zip(*options["guide"], strict=True))
    options |= {"similarity": similarity, "detach_statistics": detach, "class_balanced": balanced}
    options |= {"guide_keys": guide == "keys", "target_labels": [labels_of(t, seed + 5) for _, t in sizes]}

    def outcome(implementation: Implementation) -> Outcome:
        sources, targets = ([x.clone().requires_grad_() for x in rows] for rows in zip(*pairs, strict=True))
        found = cycle_association_pairs(
            sources, targets, labels, num_classes=CLASSES, implementation=implementation, **options
        )
        found.loss.backward()
        return Outcome(found, [gradient_of(x) for x in (*sources, *targets)])

    expected = outcome("reference")
    with tiles_of(height, group):
        found = outcome("online_softmax" if online else "blockwise")
    assert_equal(found, expected, 1e-8)
    for name in ("confusion", "kept_confusion"):
        assert torch.equal(getattr(found.association, name), getattr(expected.association, name))
    for name in ("kept_correct_ratio", "mutual_information_bound"):
        ratios = getattr(found.association, name), getattr(expected.association, name)
        torch.testing.assert_close(*ratios, equal_nan=True)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "online_softmax"])
@pytest.mark.parametrize("guide_keys", [False, True])
def test_gradient_with_refinements_is_that_of_finite_differences(
    similarity: Similarity, implementation: Implementation, guide_keys: bool
) -> None:
    source, target = domain(9, 5, similarity, 3), domain(8, 5, similarity, 4)
    labels = labels_of(9, 3)
    drawn = refinements(9, 8, 5, similarity, 3, weights=True, guide=True)

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        found = cycle_association(
            s,
            t,
            labels,
            similarity=similarity,
            num_classes=CLASSES,
            detach_statistics=False,
            class_balanced=True,
            guide_keys=guide_keys,
            implementation=implementation,
            **drawn,
        )
        assert int(found.kept) > 0
        return found.loss

    assert torch.autograd.gradcheck(loss, (source.requires_grad_(), target.requires_grad_()))


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "online_softmax"])
def test_gradient_is_that_of_finite_differences(similarity: Similarity, implementation: Implementation) -> None:
    source, target = domain(9, 5, similarity, 3), domain(8, 5, similarity, 4)
    labels = labels_of(9, 3)

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return cycle_association(
            s,
            t,
            labels,
            similarity=similarity,
            num_classes=CLASSES,
            detach_statistics=False,
            implementation=implementation,
        ).loss

    assert torch.autograd.gradcheck(loss, (source.requires_grad_(), target.requires_grad_()))


def peak_with_refinements(_rank: int, n: int) -> int | None:
    """Peak bytes of the loss and its gradients over n pixels of each domain, with every refinement."""
    return_freed_memory_at_once()
    source, target = (domain(n, 16, "cosine", seed).float().requires_grad_() for seed in (0, 1))
    drawn = refinements(n, n, 16, "cosine", 2, classes=True, weights=True, guide=True)
    drawn["guide"] = tuple(x.float() for x in drawn["guide"])
    labels = labels_of(n, 0)

    def call() -> None:
        cycle_association(
            source,
            target,
            labels,
            num_classes=CLASSES,
            implementation="blockwise",
            class_balanced=True,
            class_weights="kept_share",
            **drawn,
        ).loss.backward()

    return peak_of(call, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc, which Linux has")
def test_memory_with_every_refinement_grows_with_the_pixels_and_not_with_their_pairs() -> None:
    n = 6000
    (one,), (two,) = (in_fresh_processes(partial(peak_with_refinements, n=size), 1) for size in (n, 2 * n))
    assert one is not None
    assert two is not None
    # What grows is linear; a matrix of all pairs would add 12 times as much as this bound.
    assert two - one < 4 * (4 * n**2 - n**2) / 12
    assert two < 4 * (2 * n) ** 2 / 8


def clustered(n: int, channels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, channels, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    noise = torch.randn(n, channels, generator=generator, dtype=torch.float64)
    return centres[labels] + 2 * noise, labels


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("implementation", ["blockwise", "online_softmax"])
@pytest.mark.parametrize("channels", [11, 64, 300])
def test_fp32_is_fp64_to_rounding(similarity: Similarity, implementation: Implementation, channels: int) -> None:
    (source, labels), (target, _) = clustered(700, channels, 0), clustered(500, channels, 1)
    if similarity == "kl":
        source, target = source.softmax(dim=1), target.softmax(dim=1)
    expected = value_and_gradients(source, target, labels, similarity=similarity, implementation="reference")
    found = value_and_gradients(
        source.float(), target.float(), labels, similarity=similarity, implementation=implementation
    )
    assert_equal(found, expected, 1e-6)


@pytest.mark.parametrize("implementation", ["blockwise", "online_softmax"])
def test_bf16_matmuls_move_the_loss_by_less_than_a_hundredth(implementation: Implementation) -> None:
    (source, labels), (target, _) = clustered(700, 64, 0), clustered(500, 64, 1)
    expected = value_and_gradients(source, target, labels, implementation="reference")
    found = value_and_gradients(source.float(), target.float(), labels, implementation=implementation, dtype="bf16")
    torch.testing.assert_close(found.association.loss, expected.association.loss, rtol=1e-2, atol=0, check_dtype=False)
    for gradient, expected_gradient in zip(found.gradients, expected.gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("implementation", ["blockwise", "online_softmax"])
@pytest.mark.parametrize("guide_keys", [False, True])
def test_a_guide_with_bf16_matmuls_moves_the_loss_by_less_than_a_hundredth(
    implementation: Implementation, guide_keys: bool
) -> None:
    (source, labels), (target, _) = clustered(700, 64, 0), clustered(500, 64, 1)
    guide = clustered(700, 64, 0)[0] + source, target.roll(1, dims=1)
    options = {"guide": guide, "guide_keys": guide_keys}
    expected = value_and_gradients(source, target, labels, implementation="reference", **options)
    found = value_and_gradients(
        source.float(), target.float(), labels, implementation=implementation, dtype="bf16", **options
    )
    torch.testing.assert_close(found.association.loss, expected.association.loss, rtol=1e-2, atol=0, check_dtype=False)
    for gradient, expected_gradient in zip(found.gradients, expected.gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("implementation", ["blockwise", "online_softmax"])
@pytest.mark.parametrize("guided", [False, True])
def test_fp64_inputs_may_have_bf16_matmuls(implementation: Implementation, guided: bool) -> None:
    (source, labels), (target, _) = clustered(90, 16, 0), clustered(70, 16, 1)
    options: dict[str, Any] = {"implementation": implementation, "dtype": "bf16"}
    if guided:
        options["guide"] = source, target
    found = value_and_gradients(source, target, labels, **options)
    expected = value_and_gradients(source.float(), target.float(), labels, **options)
    torch.testing.assert_close(found.association.loss, expected.association.loss, rtol=1e-2, atol=0, check_dtype=False)
    assert [gradient.dtype for gradient in found.gradients] == [torch.float64, torch.float64]


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "online_softmax"])
def test_a_match_that_is_an_outlier_to_the_student_has_a_finite_loss(implementation: Implementation) -> None:
    targets, channels = 12_000, 4
    source = torch.tensor([[0.9997, 1e-4, 1e-4, 1e-4]])
    target = source.repeat(targets, 1) + 1e-5 * torch.rand(
        targets, channels, generator=torch.Generator().manual_seed(0)
    )
    target[7] = torch.tensor([1e-10, 1.0, 1e-10, 1e-10])
    # The guide matches the source pixel with the target pixel that is least like it: p(i -> j) is below fp32.
    guide = torch.eye(channels)[:1], torch.full((targets, channels), 0.25)
    guide[1][7] = torch.tensor([0.97, 0.01, 0.01, 0.01])
    labels = torch.zeros(1, dtype=torch.int64)
    options: dict[str, Any] = {"similarity": "kl", "guide": guide, "implementation": implementation}
    found = value_and_gradients(source, target / target.sum(dim=1, keepdim=True), labels, **options)
    assert int(found.association.kept) == 1
    assert 110 < found.association.loss < 140
    assert all(bool(gradient.isfinite().all()) for gradient in found.gradients)


def test_the_grouped_maximum_is_the_first_of_equals() -> None:
    tile = torch.randint(0, 4, (50, 1000), generator=torch.Generator().manual_seed(0)).float()
    value, index = tiles.row_maximum(tile)
    assert torch.equal(value, tile.amax(dim=1))
    assert torch.equal(index, (tile == value[:, None]).to(torch.uint8).argmax(dim=1))
