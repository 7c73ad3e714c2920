"""Judged cycles are those of the loss, and their counts are what can be counted by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.config import AssociationConfig
from dist_pca.evaluation.cycles import JudgedCycles, judge
from dist_pca.objective.cycle_association import associate_level
from dist_pca.objective.domains import Domain
from dist_pca.tools.matches.judge import summarise
from tests.tools.matches.scenes import LOOKS, NONE, SKY, SOURCE, TRUTH, random_domain, scene

drawn = {
    "seed": st.integers(0, 1000),
    "level": st.sampled_from(["features", "predictions"]),
    "scope": st.sampled_from(["pair", "world"]),
    "switches": st.fixed_dictionaries(
        {name: st.booleans() for name in ("teacher_check", "teacher_weight", "teacher_matches", "class_balanced")}
    ),
}


def plain(**keys: Any) -> AssociationConfig:
    return AssociationConfig.model_validate({"diffusion": 0.0} | keys)


def domains(seed: int, images: int = 2) -> tuple[Domain, Domain]:
    return random_domain(images, seed, teacher=True), random_domain(images, seed + 1, teacher=True)


def test_a_class_that_looks_like_another_gives_the_confusion_counted_by_hand() -> None:
    found = summarise([judge(plain(), "features", scene(SOURCE, SOURCE), scene(LOOKS, TRUTH))], 3)
    assert found.matches.tolist() == [[5, 0, 1, 0], [0, 7, 0, 1], [0, 0, 2, 0]]
    # Back from what looks like road leads to road, so no car's cycle is consistent.
    assert found.kept.tolist() == [[5, 0, 1, 0], [0, 7, 0, 1], [0, 0, 0, 0]]
    assert found.weight.flatten().tolist() == pytest.approx((found.kept / 14).flatten().tolist())
    assert found.correct_ratio == pytest.approx(14 / 15)
    assert found.kept_correct_ratio == pytest.approx(12 / 13)
    assert found.consistent_ratio == pytest.approx(14 / 16)
    assert (found.cover_ratio, found.hub_share) == (1, pytest.approx(1 / 16))
    # Every pixel matches its own place.
    assert found.edge_share == pytest.approx(found.edge_pixels)


def test_a_target_pixel_that_resembles_all_classes_is_the_hub() -> None:
    target = scene(LOOKS, TRUTH)
    target.features[:] = 0
    target.features[0, :3, 1, 1] = 1
    found = summarise([judge(plain(), "features", scene(SOURCE, SOURCE), target)], 3)
    assert (found.hub_share, found.cover_ratio) == (1, 1 / 16)
    assert (found.edge_share, found.edge_pixels) == (0, 12 / 16)
    assert found.hub_classes.tolist() == [0, 1, 0, 0]
    assert TRUTH[1][1] == SKY


@settings(max_examples=25)
@given(**drawn)
def test_the_counts_are_those_that_training_logs(seed: int, level: Any, scope: Any, switches: dict[str, bool]) -> None:
    config = plain(scope=scope, diffusion=0.5, **switches)
    pair = domains(seed)
    logged = associate_level(config, level, *pair, None)
    found = summarise([judge(config, level, *pair)], 3)
    assert torch.equal(found.matches[:, :-1], logged.confusion)
    assert torch.equal(found.kept[:, :-1], logged.kept_confusion)
    assert torch.equal(found.kept.sum(dim=1), logged.kept_per_class)
    assert found.cover_ratio == pytest.approx(float(logged.cover_ratio))
    assert found.consistent_ratio == pytest.approx(float(logged.consistent_ratio))
    assert found.correct_ratio == pytest.approx(float(logged.correct_ratio), nan_ok=True)
    assert found.kept_correct_ratio == pytest.approx(float(logged.kept_correct_ratio), nan_ok=True)
    assert float(found.weight.sum()) == pytest.approx(float(logged.kept > 0))
    if switches["class_balanced"] and logged.kept > 0:
        classes = found.weight.sum(dim=1)
        assert classes[classes > 0].tolist() == pytest.approx([1 / int((classes > 0).sum())] * int((classes > 0).sum()))


@settings(max_examples=25)
@given(seed=drawn["seed"], level=drawn["level"], scope=drawn["scope"], threshold=st.floats(0.01, 1))
def test_a_cycle_through_a_pixel_of_which_the_teacher_is_not_sure_enough_is_not_kept(
    seed: int, level: Any, scope: Any, threshold: float
) -> None:
    source, target = domains(seed)
    assert target.teacher_logits is not None
    confidence, classes = target.teacher_logits.softmax(dim=1).flatten(2).transpose(1, 2).max(dim=2)
    checked = plain(scope=scope, teacher_check=True, teacher_threshold=threshold)
    place, kept = 0, 0
    for cycles in judge(checked, level, source, target):
        # A pair's targets are those of one image, the world's those of all.
        pixels = slice(place, place + len(cycles.target_labels))
        sure = confidence.flatten()[pixels][cycles.targets] >= threshold
        alike = classes.flatten()[pixels][cycles.targets] == cycles.labels
        assert torch.equal(cycles.kept, cycles.consistent & alike & sure)
        place, kept = pixels.stop, kept + int(cycles.kept.sum())
    assert kept == int(associate_level(checked, level, source, target, None).kept)


@settings(max_examples=25)
@given(
    seed=drawn["seed"], scope=drawn["scope"], levels=st.sampled_from([("features", "predictions"), ("predictions",)])
)
def test_classes_weigh_as_much_as_cycles_of_features_are_kept_or_of_predictions_where_they_are_alone(
    seed: int, scope: Any, levels: tuple[str, ...]
) -> None:
    config = plain(scope=scope, levels=levels, teacher_weight=True, class_balanced=True, class_weights="kept_share")
    source, target = domains(seed)
    share = associate_level(config, levels[0], source, target, None).kept_share  # type: ignore[arg-type]
    predictions = associate_level(config, "predictions", source, target, None)
    found = summarise([judge(config, "predictions", source, target)], 3)
    expected = torch.where(predictions.kept_per_class > 0, share, 0)
    assert found.weight.sum(dim=1).tolist() == pytest.approx((expected / expected.sum().clamp(min=1e-9)).tolist())


@settings(max_examples=25)
@given(**drawn)
def test_target_labels_never_change_matches_cycles_or_weights(
    seed: int, level: Any, scope: Any, switches: dict[str, bool]
) -> None:
    config, (source, target) = plain(scope=scope, diffusion=0.5, **switches), domains(seed)
    assert target.labels is not None
    order = torch.randperm(target.labels.numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = target._replace(labels=target.labels.flatten()[order].view_as(target.labels))
    for one, other in zip(judge(config, level, source, target), judge(config, level, source, shuffled), strict=True):
        for name in ("targets", "ends", "consistent", "kept", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("level", ["features", "predictions"])
def test_pairs_match_within_themselves_and_the_world_does_not(level: Any) -> None:
    source, target = domains(0)
    both = judge(plain(scope="pair"), level, source, target)
    for place, cycles in enumerate(both):
        alone = judge(plain(scope="pair"), level, *(one_image(domain, place) for domain in (source, target)))[0]
        assert torch.equal(cycles.targets, alone.targets)
        assert torch.equal(cycles.kept, alone.kept)
        assert int(cycles.targets.max()) < 20
    (whole,) = judge(plain(scope="world"), level, source, target)
    assert crosses(whole)


def test_the_loss_of_a_batch_is_shared_out_over_all_its_candidate_sets() -> None:
    candidate_sets = judge(plain(scope="pair", teacher_weight=True), "features", *domains(3))
    assert sum(float(cycles.weights.sum()) for cycles in candidate_sets) == pytest.approx(1)
    assert all(float(cycles.weights[~cycles.kept].sum()) == 0 for cycles in candidate_sets)


def test_batches_without_labels_leave_nothing_to_judge() -> None:
    source, target = domains(0)
    assert target.labels is not None
    found = summarise(
        [judge(plain(), "features", source, target._replace(labels=target.labels.new_full((2, 4, 5), NONE)))], 3
    )
    assert found.matches[:, :-1].sum() == 0
    assert found.correct_ratio != found.correct_ratio


def one_image(domain: Domain, place: int) -> Domain:
    images = slice(place, place + 1)
    parts: list[Any] = [x[images] if isinstance(x, torch.Tensor) else x for x in domain]
    return Domain(*parts)


def crosses(cycles: JudgedCycles) -> bool:
    """Whether a match leads from one image to another."""
    images = torch.arange(len(cycles.labels)) // 20
    return bool((images != cycles.targets // 20).any())
