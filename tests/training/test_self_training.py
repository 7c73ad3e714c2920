"""Runs with a teacher: the same on any number of ranks, and the same after a kill."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import build_streets, launch

pytestmark = pytest.mark.slow

NETWORK = ("model.association_features=projection", "model.association_stride=8")
EVERY_TERM = (
    *("model.joint_batch=true", "model.running_statistics=all", "model.batch_norm=sync"),
    *NETWORK,
    *("optimizer.name=sgd", "optimizer.lr=2e-3", "schedule.name=constant"),
    *("training.ema_decay=0.6", "training.steps=4", "training.checkpoint_every=2", "seed=3"),
    *("data.photometric.probability=0.8", "data.photometric.blur_probability=0.5"),
    "data.photometric.domains=[source,target]",
    *("objective.self_training.weight=1", "objective.self_training.threshold=0.6"),
    *("objective.self_training.start_step=0", "objective.self_training.ignore_top=0.1"),
    *("objective.masked_consistency.weight=1", "objective.masked_consistency.block=8"),
    *("objective.association.start_step=0", "objective.association.ramp_steps=0"),
    *("objective.association.label_share=0.5", "objective.association.teacher_matches=false"),
    *("objective.association.teacher_check=true", "objective.association.teacher_weight=true"),
    *("objective.association.class_balanced=true", "objective.association.class_weights=kept_share"),
    *("objective.smoothness.weight=0.01", "objective.dice.weight=0.5"),
    *("objective.source_contrast.weight=0.1", "objective.source_contrast.anchors=20"),
    "objective.class_statistics.weight=0.1",
    *("objective.feature_distance.weight=0.005", "objective.feature_distance.classes=[road,building,car]"),
    # The deepest map of such small crops has four cells.
    "objective.feature_distance.share=0",
)
LOGGED = {
    *("loss", "ce", "lovasz", "dice", "smoothness_target", "self_training", "masked_consistency", "confident_share"),
    *("association_features", "association_predictions", "source_contrast", "class_statistics", "feature_distance"),
}


def build_trained(folder: Path) -> str:
    """Streets, and the setting that begins with a network that has learnt something of them.

    Those of an untrained one are nearly uniform, so that rounding decides among the matches of its predictions.
    """
    build_streets(folder)
    first = ("objective.adapt=false", "optimizer.lr=2e-3", "training.steps=60", "training.checkpoint_every=60")
    done = launch(folder, "first", *NETWORK, *first, launcher="accelerate/single")
    assert done.returncode == 0, done.stderr
    return f"model.init_from={folder}/runs/first"


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def distances(first: Path, second: Path) -> dict[str, float]:
    """Of all weights after the last step, and of the teacher's: distance over norm."""
    found = {}
    for part in ("model", "ema"):
        one, two = (load_file(run / f"checkpoints/step-00000004/{part}.safetensors") for run in (first, second))
        assert one.keys() == two.keys()
        pairs = [(value, two[name]) for name, value in one.items() if value.is_floating_point()]
        apart = sum(float((other - value).norm() ** 2) for value, other in pairs)
        found[part] = (apart / sum(float(value.norm() ** 2) for value, _ in pairs)) ** 0.5
    return found


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(
            ("objective.association.teacher_matches=true", "objective.association.teacher_keys=true"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            # Batch norm's batch is a micro-batch, so two of them are not one big one. Frozen, it leaves the student's
            # features at a distance of 0 from the pretrained ones, where rounding decides the gradient.
            (
                *("training.accumulation=2", "training.grad_cache=true", "model.batch_norm=frozen"),
                "objective.feature_distance.weight=0",
            ),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_two_ranks_with_every_term_are_one_rank_with_the_whole_batch(tmp_path: Path, more: tuple[str, ...]) -> None:
    begin = build_trained(tmp_path)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for run, launcher in ((one, "accelerate/single"), (two, "accelerate/cpu")):
        done = launch(tmp_path, run.name, *EVERY_TERM, begin, *more, launcher=launcher)
        assert done.returncode == 0, done.stderr
    for of_one, of_two in zip(lines(one), lines(two), strict=True):
        for term in LOGGED & of_one.keys():
            assert of_two[term] == pytest.approx(of_one[term], rel=1e-5, abs=1e-6), (of_one["step"], term)
        assert of_two["confusion_features"] == of_one["confusion_features"]
        assert 0 < of_one["confident_share"] < 1
        assert min(of_one["kept_features"], of_one["kept_predictions"]) > 0
    assert max(distances(one, two).values()) <= 1e-5


def test_a_run_goes_on_with_another_number_of_ranks_teacher_and_all(tmp_path: Path) -> None:
    begin = build_trained(tmp_path)
    whole, halves = (tmp_path / "runs" / name for name in ("whole", "halves"))
    assert launch(tmp_path, "whole", *EVERY_TERM, begin).returncode == 0
    # The first start saves after one step and leaves; the second goes on from there.
    launch(tmp_path, "halves", *EVERY_TERM, begin, "training.time_limit=0.001")
    assert not (halves / "checkpoints/step-00000004").exists()
    done = launch(tmp_path, "halves", *EVERY_TERM, begin, "training.time_limit=null", launcher="accelerate/single")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["world_size"] for line in (halves / "starts.jsonl").read_text().splitlines()] == [2, 1]
    assert max(distances(whole, halves).values()) <= 1e-5


def test_a_run_goes_on_bit_for_bit_teacher_and_all(tmp_path: Path) -> None:
    begin = build_trained(tmp_path)
    whole = launch(tmp_path, "whole", *EVERY_TERM, begin)
    assert whole.returncode == 0, whole.stderr
    halves = tmp_path / "runs" / "halves"
    for limit in ("training.time_limit=0.001", "training.time_limit=null"):
        # The first start saves after one step and leaves; the second goes on from there.
        launch(tmp_path, "halves", *EVERY_TERM, begin, limit)
    for part in ("model", "ema", "optimizer"):
        first, second = (
            load_file(run / f"checkpoints/step-00000004/{part}.safetensors")
            for run in (tmp_path / "runs" / "whole", halves)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    starts = [json.loads(line)["step"] for line in (halves / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0 < starts[1] < 4
