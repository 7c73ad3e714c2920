"""The objective is its terms, and the same on any number of ranks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dist_pca.config import AssociationConfig, DiceConfig, LovaszConfig, ObjectiveConfig, SmoothnessConfig
from dist_pca.config.objective import (
    ClassStatisticsConfig,
    MaskedConsistencyConfig,
    SelfTrainingConfig,
    SourceContrastConfig,
)
from dist_pca.errors import UserError
from dist_pca.objective import Domain, objective
from dist_pca.objective.class_statistics import ClassStatistics
from dist_pca.objective.cycle_association import associate_level, association_weight
from dist_pca.objective.dice import dice_loss
from dist_pca.objective.smoothness import smoothness
from tests.support.ranks import run_on_ranks

CLASSES = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Domain:
        features = self.features(images).relu()
        return Domain(self.head(features), features, labels)


def network() -> Net:
    torch.manual_seed(0)
    return Net().double()


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES + 1, (count, 16, 24), generator=generator)
    labels[labels == CLASSES] = 255
    # Ranks differ in how much of their labels is ignored.
    labels[: count // 2, 4:] = 255
    return torch.randn(count, 3, 16, 24, generator=generator, dtype=torch.float64), labels


def one_rank(rank: int, ranks: int, scope: str, budget: int | None) -> dict[str, Any]:
    net = network()
    domains = []
    for seed in (1, 2):
        pixels, labels = images(6, seed)
        share = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
        domains.append(net(pixels[share], labels[share])._replace(seeds=range(6)[share]))
    association = AssociationConfig(
        weight=0.5,
        scope=scope,  # type: ignore[arg-type]
        pixel_budget=budget,
        pixel_sampling="balanced",
    )
    config = ObjectiveConfig(association=association, dice=DiceConfig(weight=0.5))
    loss, terms = objective(config, *domains, step=0, class_weights=(0.5, 2.0, 0.0, 1.5))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    sent = [int(terms.pop(f"communication_bytes_{level}")) for level in config.association.levels]
    assert (min(sent) > 0) == (ranks > 1 and scope == "world")
    values = torch.stack([terms[name].detach().double() for name in sorted(terms) if terms[name].ndim == 0])
    if dist.is_initialized():
        for tensor in (gradient, values):
            dist.all_reduce(tensor)
    return {"gradient": gradient / ranks, "values": values / ranks, "names": sorted(terms)}


@pytest.mark.parametrize(
    ("ranks", "scope", "budget"),
    [(2, "world", 10), (3, "pair", None), pytest.param(3, "world", None, marks=pytest.mark.slow)],
)
def test_ranks_equal_one_process_in_every_term_and_gradient(
    tmp_path: Path, ranks: int, scope: str, budget: int | None
) -> None:
    expected = one_rank(0, 1, scope, budget)
    for found in run_on_ranks(one_rank, ranks, tmp_path, scope, budget):
        assert found["names"] == expected["names"]
        torch.testing.assert_close(found["values"], expected["values"], rtol=1e-5, atol=1e-6)
        scale = float(expected["gradient"].abs().max())
        torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("levels", [("features", "predictions"), ("predictions", "features")])
def test_cycles_of_features_weigh_the_classes_at_both_levels(levels: Any) -> None:
    net = network()
    source, target = (net(*images(2, seed)) for seed in (1, 2))
    association = AssociationConfig(levels=levels, class_balanced=True, class_weights="kept_share")
    _, terms = objective(ObjectiveConfig(association=association), source, target, step=0)
    features = associate_level(association, "features", source, target, None)
    predictions = associate_level(association, "predictions", source, target, None, features.kept_share)
    assert torch.equal(terms["association_features"], features.loss)
    assert torch.equal(terms["association_predictions"], predictions.loss)
    own = associate_level(association, "predictions", source, target, None)
    assert not torch.isclose(own.loss, predictions.loss)


def test_total_is_the_weighted_sum_of_its_terms() -> None:
    net = network()
    source, target = (net(*images(2, seed)) for seed in (1, 2))
    config = ObjectiveConfig(
        lovasz=LovaszConfig(weight=0.7),
        association=AssociationConfig(weight=0.3),
        smoothness=SmoothnessConfig(weight=0.2),
    )
    total, terms = objective(config, source, target, step=0)
    expected = (
        terms["ce"]
        + 0.7 * terms["lovasz"]
        + 0.3 * (terms["association_features"] + terms["association_predictions"])
        + 0.2 * (terms["smoothness_source"] + terms["smoothness_target"])
    )
    torch.testing.assert_close(total, expected)
    upsampled = F.interpolate(source.logits.float(), size=(16, 24), mode="bilinear", align_corners=False)
    assert source.labels is not None
    torch.testing.assert_close(terms["ce"], F.cross_entropy(upsampled, source.labels, ignore_index=255))


def test_terms_of_features_and_of_a_teacher_are_added_with_their_weights() -> None:
    net = network()
    source, target, mixed, masked = (net(*images(2, seed)) for seed in range(1, 5))
    config = ObjectiveConfig(
        lovasz=LovaszConfig(weight=0),
        association=AssociationConfig(weight=0),
        smoothness=SmoothnessConfig(weight=0),
        source_contrast=SourceContrastConfig(weight=0.2),
        class_statistics=ClassStatisticsConfig(weight=0.3),
        self_training=SelfTrainingConfig(weight=0.5, threshold=0.2),
        masked_consistency=MaskedConsistencyConfig(weight=0.7),
    )
    confident = torch.ones(2, 16, 24, dtype=torch.bool)
    total, terms = objective(
        config,
        source._replace(seeds=(3, 4), teacher_features=source.features.detach()),
        target._replace(teacher_logits=target.logits.detach()),
        mixed._replace(confident=confident),
        masked._replace(confident=confident),
        step=0,
        statistics=ClassStatistics(),
    )
    weights = {"source_contrast": 0.2, "class_statistics": 0.3, "self_training": 0.5, "masked_consistency": 0.7}
    assert all(terms[name] > 0 for name in weights)
    torch.testing.assert_close(total, terms["ce"] + sum(weight * terms[name] for name, weight in weights.items()))


def test_cross_entropy_is_the_weighted_mean_and_dice_is_added() -> None:
    source = network()(*images(2, 1))
    weights = (0.5, 2.0, 0.0, 1.5)
    config = ObjectiveConfig(adapt=False, lovasz=LovaszConfig(weight=0), dice=DiceConfig(weight=0.3))
    total, terms = objective(config, source, None, step=0, class_weights=weights)
    upsampled = F.interpolate(source.logits.float(), size=(16, 24), mode="bilinear", align_corners=False)
    assert source.labels is not None
    weighted = F.cross_entropy(upsampled, source.labels, upsampled.new_tensor(weights), ignore_index=255)
    torch.testing.assert_close(terms["ce"], weighted)
    torch.testing.assert_close(total, weighted + 0.3 * terms["dice"])
    torch.testing.assert_close(terms["dice"], dice_loss(upsampled, source.labels))


def test_target_labels_never_reach_the_loss() -> None:
    net = network()
    source, target = (net(*images(2, seed)) for seed in (1, 2))
    with_labels, _ = objective(ObjectiveConfig(), source, target, step=0)
    without, terms = objective(ObjectiveConfig(), source, target._replace(labels=None), step=0)
    assert torch.equal(with_labels, without)
    assert terms["correct_ratio_features"].isnan()


@pytest.mark.parametrize(
    "keys", [{"weight": 0.0}, {"start_step": 10}, {"start_step": 10, "teacher_matches": True, "teacher_keys": True}]
)
def test_matches_are_judged_without_association_too_where_target_labels_are_known(keys: dict[str, Any]) -> None:
    source, target = (network()(*images(2, seed)) for seed in (1, 2))
    config = ObjectiveConfig(association=AssociationConfig(**keys))
    total, terms = objective(config, source, target, step=9)
    same, judged = objective(config, source, target, step=9, judge=True)
    assert torch.equal(total, same)
    with_association = objective(ObjectiveConfig(), source, target, step=9)[1]
    added = {
        f"{name}_{level}"
        for name in ("correct_ratio", "kept_correct_ratio", "confusion", "kept_confusion")
        for level in ("features", "predictions")
    }
    assert judged.keys() - terms.keys() == added
    assert all(torch.equal(judged[name], with_association[name]) for name in added)
    unlabelled = objective(config, source, target._replace(labels=None), step=9, judge=True)[1]
    assert unlabelled.keys() == terms.keys()


def test_source_only_leaves_the_target_out() -> None:
    net = network()
    source, target = (net(*images(2, seed)) for seed in (1, 2))
    alone, terms = objective(ObjectiveConfig(adapt=False), source, target, step=0)
    assert set(terms) == {"loss", "ce", "lovasz"}
    assert torch.equal(alone, objective(ObjectiveConfig(), source, None, step=0)[0])


def test_released_convention_scales_lovasz_by_micro_batches() -> None:
    source = network()(*images(2, 1))
    mean, terms = objective(ObjectiveConfig(adapt=False), source, None, step=0, accumulation=2)
    released_config = ObjectiveConfig(adapt=False, lovasz=LovaszConfig(convention="released"))
    released, _ = objective(released_config, source, None, step=0, accumulation=2)
    torch.testing.assert_close(released - mean, 0.75 * terms["lovasz"])


def test_association_starts_late_and_rises_linearly() -> None:
    config = AssociationConfig(weight=0.4, start_step=10, ramp_steps=4)
    assert [association_weight(config, step) for step in (0, 9, 10, 11, 13, 50)] == pytest.approx(
        [0, 0, 0.1, 0.2, 0.4, 0.4]
    )
    source, target = (network()(*images(2, seed)) for seed in (1, 2))
    _, terms = objective(ObjectiveConfig(association=config), source, target, step=9)
    assert not any(name.startswith("association") for name in terms)


def test_smoothness_sharpens_below_its_threshold_and_smooths_above() -> None:
    for scale, grows in ((1.0, True), (40.0, False)):
        logits = (scale * torch.tensor([1.0, 0.0])).view(1, 2, 1, 1).requires_grad_()
        smoothness(logits, threshold=10.0).backward()
        assert logits.grad is not None
        assert (logits.grad[0, 0] < 0).item() is grows


def test_smoothness_is_the_papers_formula_pixel_by_pixel() -> None:
    logits = 6 * torch.randn(2, CLASSES, 2, 3, generator=torch.Generator().manual_seed(0))
    losses, slopes, threshold = [], [], 3.0
    for pixel in logits.permute(0, 2, 3, 1).reshape(-1, CLASSES).tolist():
        normaliser = math.log(sum(math.exp(x) for x in pixel))
        smoothed = sum(normaliser - x for x in pixel) / CLASSES
        losses.append((smoothed / threshold - 1) * smoothed)
        # d l / d x_c = P_c - 1 / K; the factor before l has no gradient.
        slopes.append([(smoothed / threshold - 1) * (math.exp(x - normaliser) - 1 / CLASSES) for x in pixel])
    logits.requires_grad_()
    loss = smoothness(logits, threshold)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert logits.grad is not None
    found = len(losses) * logits.grad.permute(0, 2, 3, 1).reshape(-1, CLASSES)
    torch.testing.assert_close(found, torch.tensor(slopes), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampling", ["grid", "balanced"])
def test_a_budget_limits_the_positions_of_every_image(sampling: str) -> None:
    net = network()
    source, target = (net(*images(2, seed))._replace(seeds=(3, 4)) for seed in (1, 2))
    config = AssociationConfig(pixel_budget=8, pixel_sampling=sampling)  # type: ignore[arg-type]
    _, terms = objective(ObjectiveConfig(association=config), source, target, step=0)
    everywhere = objective(ObjectiveConfig(), source, target, step=0)[1]
    chance = float(terms["mutual_information_bound_features"]) + terms["association_features"].item()
    assert chance <= math.log(16) + math.log(16) + 1e-6
    assert float(everywhere["mutual_information_bound_features"]) + everywhere["association_features"].item() > chance


def test_features_that_are_not_finite_name_the_level() -> None:
    net = network()
    source, target = (net(*images(2, seed)) for seed in (1, 2))
    broken = source._replace(features=source.features * torch.nan)
    with pytest.raises(UserError, match=r"objective\.association, features: source has \d+ values that are NaN"):
        objective(ObjectiveConfig(), broken, target, step=0)
