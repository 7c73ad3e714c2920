"""Distance to the pretrained backbone's features: formula, classes, gradients, and the same on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.classes import CITYSCAPES_CLASSES, ClassInfo, label_set
from dist_pca.config import FeatureDistanceConfig, ObjectiveConfig
from dist_pca.errors import UserError
from dist_pca.objective import Domain, objective
from dist_pca.objective.feature_distance import THINGS, feature_distance, thing_classes
from tests.support.ranks import run_on_ranks

THING_IDS = (1, 3)


def maps(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, pretrained = torch.randn(2, count, 6, 3, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (count, 12), generator=generator)
    labels[labels == 4] = 255
    return features, pretrained, labels


def test_it_is_the_mean_distance_over_cells_of_things() -> None:
    features, pretrained, labels = maps(2)
    expected = [
        sum((float(features[b, c, i // 4, i % 4]) - float(pretrained[b, c, i // 4, i % 4])) ** 2 for c in range(6))
        ** 0.5
        for b in range(2)
        for i in range(12)
        if int(labels[b, i]) in THING_IDS
    ]
    found = feature_distance(features, pretrained, labels, THING_IDS)
    assert float(found) == pytest.approx(sum(expected) / len(expected))


def test_the_backbone_that_trains_alone_gets_gradients_and_on_things_alone() -> None:
    features, pretrained, labels = (values.requires_grad_(values.is_floating_point()) for values in maps(2))
    feature_distance(features, pretrained, labels, THING_IDS).backward()
    assert pretrained.grad is None
    assert features.grad is not None
    things = torch.isin(labels, torch.tensor(THING_IDS)).view(2, 3, 4)
    assert torch.equal(features.grad.abs().sum(dim=1) > 0, things)


def test_no_thing_in_sight_and_no_distance_yet_are_finite() -> None:
    features, pretrained, labels = maps(1)
    for values, classes in ((features, torch.zeros_like(labels)), (pretrained.clone(), labels)):
        values.requires_grad_()
        loss = feature_distance(values, pretrained, classes, THING_IDS)
        loss.backward()
        assert float(loss.detach()) == 0
        assert values.grad is not None
        assert values.grad.abs().max() == 0


def test_a_cell_counts_by_the_share_of_its_pixels() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :4, :3] = 1  # 75 % of the first cell
    labels[:, :4, 4:6] = 1  # half of the second
    labels[:, 4:, :2], labels[:, 4:, 2:4] = 1, 2  # all things in the third, but of two classes
    pretrained, logits = torch.zeros(1, 5, 2, 2), torch.randn(1, 3, 2, 2)
    deepest = torch.arange(1.0, 5.0).view(1, 1, 2, 2).expand(1, 5, 2, 2)
    source = Domain(logits, deepest, labels, deepest=deepest, pretrained=pretrained)
    for share, cells in ((0.75, [1.0]), (0.5, [1.0, 2.0, 3.0])):
        config = ObjectiveConfig(adapt=False, feature_distance=FeatureDistanceConfig(weight=0.1, share=share))
        loss, terms = objective(config, source, None, step=0, things=(1, 2))
        assert float(terms["feature_distance"]) == pytest.approx(5**0.5 * sum(cells) / len(cells))
        torch.testing.assert_close(
            loss, terms["ce"] + config.lovasz.weight * terms["lovasz"] + 0.1 * terms["feature_distance"]
        )


def test_classes_are_cityscapes_things_unless_named() -> None:
    on = FeatureDistanceConfig(weight=0.005)
    assert thing_classes(on, CITYSCAPES_CLASSES) == (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
    sixteen = label_set("synthia_16")
    assert [sixteen[train_id].name for train_id in thing_classes(on, sixteen)] == [
        name for name in THINGS if name not in ("truck", "train")
    ]
    named = FeatureDistanceConfig(weight=0.005, classes=("car", "sky"))
    assert thing_classes(named, CITYSCAPES_CLASSES) == (13, 10)
    assert thing_classes(FeatureDistanceConfig(), [ClassInfo("soil", (0, 0, 0))]) == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cra",), r"feature_distance\.classes: 'cra' is not a class of the run; the nearest is 'carrot'"),
        (None, r"feature_distance\.classes: the run has none .*; set the key to some of soil, carrot"),
    ],
)
def test_classes_that_the_run_lacks_are_refused(names: tuple[str, ...] | None, message: str) -> None:
    classes = [ClassInfo("soil", (0, 0, 0)), ClassInfo("carrot", (1, 1, 1))]
    with pytest.raises(UserError, match=message):
        thing_classes(FeatureDistanceConfig(weight=1, classes=names), classes)


def of_rank(rank: int, ranks: int) -> dict[str, Any]:
    features, pretrained, labels = maps(4)
    # Ranks differ in how many cells they have.
    labels[3] = 255
    features, pretrained, labels = (values.chunk(ranks)[rank] for values in (features, pretrained, labels))
    features = features.clone().requires_grad_()
    loss = feature_distance(features, pretrained, labels, THING_IDS)
    loss.backward()
    assert features.grad is not None
    return {"loss": loss.detach() / ranks, "gradient": features.grad / ranks}


def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    whole = of_rank(0, 1)
    found = run_on_ranks(of_rank, 2, tmp_path)
    torch.testing.assert_close(sum(rank["loss"] for rank in found), whole["loss"])
    torch.testing.assert_close(torch.cat([rank["gradient"] for rank in found]), whole["gradient"])
