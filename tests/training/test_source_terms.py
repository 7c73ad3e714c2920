"""A run with terms on its features: finite, the same on one rank and on two, and after a restart."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import build_streets, launch

# Several starts of two processes each.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TERMS = (
    *("model.batch_norm=sync", "model.association_features=projection", "model.association_stride=8"),
    *("optimizer.name=sgd", "optimizer.lr=2e-3", "schedule.name=constant"),
    *("training.steps=2", "training.checkpoint_every=1"),
    *("objective.source_contrast.weight=0.1", "objective.source_contrast.anchors=20"),
    *("objective.class_statistics.weight=0.1", "objective.self_training.threshold=0.2"),
    *("objective.feature_distance.weight=0.005", "objective.feature_distance.classes=[road,building,car]"),
    # The deepest map of such small crops has four cells.
    "objective.feature_distance.share=0",
    # Predictions of an untrained network are nearly uniform, so that rounding decides among their matches.
    "objective.association.levels=[features]",
)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_train_with_these_terms_as_one_does(tmp_path: Path) -> None:
    build_streets(tmp_path)
    for name, launcher in (("one", "accelerate/single"), ("two", "accelerate/cpu")):
        done = launch(tmp_path, name, *TERMS, launcher=launcher)
        assert done.returncode == 0, done.stderr
    one, two = (lines(tmp_path / "runs" / name) for name in ("one", "two"))
    for of_one, of_two in zip(one, two, strict=True):
        for term in ("source_contrast", "class_statistics", "feature_distance", "loss"):
            assert math.isfinite(of_two[term])
            assert of_two[term] > 0
            assert of_two[term] == pytest.approx(of_one[term], rel=1e-4), (of_one["step"], term)


@pytest.mark.exhaustive
def test_the_pretrained_backbone_and_the_class_statistics_are_the_same_after_a_restart(tmp_path: Path) -> None:
    build_streets(tmp_path)
    runs = tmp_path / "runs"
    whole = launch(tmp_path, "whole", *TERMS)
    assert whole.returncode == 0, whole.stderr
    for limit in ("training.time_limit=0.001", "training.time_limit=null"):
        # The first start saves after one step and leaves; the second goes on from there.
        launch(tmp_path, "halves", *TERMS, limit)
    for term in ("feature_distance", "class_statistics"):
        assert [line[term] for line in lines(runs / "halves")] == [line[term] for line in lines(runs / "whole")]
    first, second = (
        load_file(runs / name / "checkpoints/step-00000002/model.safetensors") for name in ("whole", "halves")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    starts = [json.loads(line)["step"] for line in (runs / "halves" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 1]
