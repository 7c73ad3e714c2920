"""Runs with a teacher: the same on any number of ranks, and the same after a kill."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import build_streets, launch

pytestmark = pytest.mark.slow

EVERY_TERM = (
    # A network that has learnt nothing has ties among its matches, which rounding decides: most in its teacher's
    # features, and on a finer grid than its own.
    *("objective.association.teacher_matches=false", "model.association_stride=null"),
    *("model.joint_batch=true", "model.running_statistics=all"),
    *("model.batch_norm=sync", "optimizer.name=sgd", "optimizer.lr=2e-3", "schedule.name=constant"),
    *("training.ema_decay=0.6", "training.steps=4", "training.checkpoint_every=2", "seed=3"),
    *("data.photometric.probability=0.8", "data.photometric.blur_probability=0.5"),
    *(
        "objective.self_training.weight=1",
        "objective.self_training.threshold=0.11",
        "objective.self_training.start_step=0",
    ),
    *("objective.self_training.ignore_top=0.1", "objective.masked_consistency.weight=1"),
    *(
        "objective.masked_consistency.block=8",
        "objective.association.start_step=0",
        "objective.association.label_share=0.5",
    ),
    *("objective.association.teacher_check=true", "objective.association.teacher_weight=true"),
    *("objective.association.class_balanced=true", "objective.association.class_weights=kept_share"),
)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("training.accumulation=2", "training.grad_cache=true"), marks=pytest.mark.exhaustive),
    ],
)
def test_two_ranks_with_every_term_are_one_rank_with_the_whole_batch(tmp_path: Path, more: tuple[str, ...]) -> None:
    build_streets(tmp_path)
    for name, launcher in (("one", "accelerate/single"), ("two", "accelerate/cpu")):
        # Batch norm's batch is a micro-batch, so two of them are not one big one.
        frozen = ("model.batch_norm=frozen",) if more else ()
        done = launch(tmp_path, name, *EVERY_TERM, *more, *frozen, launcher=launcher)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for of_one, of_two in zip(lines(one), lines(two), strict=True):
        for term in ("loss", "ce", "self_training", "masked_consistency", "confident_share", "association_features"):
            assert of_two[term] == pytest.approx(of_one[term], rel=1e-4), (of_one["step"], term)
        assert 0 < of_one["confident_share"] < 1
    for part in ("model", "ema"):
        first, second = (load_file(run / f"checkpoints/step-00000004/{part}.safetensors") for run in (one, two))
        start = load_file(one / f"checkpoints/step-00000002/{part}.safetensors")
        for name, value in first.items():
            if value.is_floating_point():
                moved = (value - start[name]).norm()
                # The gradient of a bias in front of another batch norm cancels to rounding.
                assert (second[name] - value).norm() <= 1e-5 * value.norm() + 1e-3 * moved + 1e-7, (part, name)


def test_a_run_goes_on_bit_for_bit_teacher_and_all(tmp_path: Path) -> None:
    build_streets(tmp_path)
    whole = launch(tmp_path, "whole", *EVERY_TERM)
    assert whole.returncode == 0, whole.stderr
    halves = tmp_path / "runs" / "halves"
    for limit in ("training.time_limit=0.001", "training.time_limit=null"):
        # The first start saves after one step and leaves; the second goes on from there.
        launch(tmp_path, "halves", *EVERY_TERM, limit)
    for part in ("model", "ema", "optimizer"):
        first, second = (
            load_file(run / f"checkpoints/step-00000004/{part}.safetensors")
            for run in (tmp_path / "runs" / "whole", halves)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    starts = [json.loads(line)["step"] for line in (halves / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0 < starts[1] < 4
