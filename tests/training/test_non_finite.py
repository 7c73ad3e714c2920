"""A NaN on one rank costs a step and no more; many in a row end the run."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_pca.data.collate import Batch
from dist_pca.objective import Domain
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.shards.manifest import load_manifest
from dist_pca.training.non_finite import NonFiniteSteps, zero_non_finite
from tests.support.runs import build_streets, launch


def domain(logits: torch.Tensor) -> Domain:
    return Domain(logits, torch.ones(1, 2, 2, 2), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["loss", "term", "logits"])
def test_a_value_that_is_not_finite_makes_every_gradient_nan(tmp_path: Path, value: float, where: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    logits = torch.full((1, 2, 2, 2), value if where == "logits" else 1.0)
    terms = {"ce": torch.tensor(value if where == "term" else 1.0)}
    loss = weight.sum() * (value if where == "loss" else 1.0)
    batch = Batch(torch.zeros(1, 3, 2, 2), None, ["a"], [0], [])
    NonFiniteSteps(torch.nn.Linear(1, 1), tmp_path, 1).check_loss(
        loss, terms, (domain(logits), None), (batch, None)
    ).backward()
    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_a_sound_loss_and_its_gradient_keep_their_bits(tmp_path: Path) -> None:
    weight = torch.rand(100, requires_grad=True)
    loss = (weight**2).sum()
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    # Diagnoses may be undefined.
    terms = {"ce": torch.tensor(1.0), "correct_ratio_features": torch.tensor(float("nan"))}
    watched = NonFiniteSteps(torch.nn.Linear(1, 1), tmp_path, 1).check_loss(loss, terms, (None, None), (None, None))
    assert torch.equal(watched, loss)
    assert torch.equal(torch.autograd.grad(watched, weight)[0], expected)


def test_what_association_gets_is_finite_and_otherwise_untouched() -> None:
    logits = torch.tensor([1.5, float("nan"), float("inf"), float("-inf")])
    assert zero_non_finite(domain(logits)).logits.tolist() == [1.5, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (1, 2)), 3])
def test_a_non_finite_step_leaves_no_trace_and_many_in_a_row_stop_the_run(tmp_path: Path, stage: int) -> None:
    build_streets(tmp_path)
    settings = (
        f"training.zero_stage={stage}",
        "training.checkpoint_every=1",
        "training.keep_checkpoints=9",
        "training.max_non_finite_steps=2",
        "training.steps=9",
        "objective.class_statistics.weight=0.1",
    )
    train = partial(
        launch,
        tmp_path,
        "broken",
        *settings,
        launcher_options=("--zero_stage", str(stage)),
        module="tests.training.broken_run",
    )
    done = train()
    run = tmp_path / "runs" / "broken"
    outcome = read_exit_status(run)
    assert outcome is not None, done.stderr
    assert outcome.code == ExitCode.DIVERGED
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said == f"error: {outcome.message}"
    assert "step 6: not finite on rank 1: lovasz, the last of 2 in a row" in said

    for part in ("model", "optimizer", "classes"):
        one, two, three, four, five = (
            load_file(run / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors") for step in range(1, 6)
        )
        assert all(torch.equal(three[name], value) for name, value in two.items())
        assert all(torch.equal(five[name], value) for name, value in four.items())
        for before, after in ((one, two), (three, four)):
            assert any(not torch.equal(after[name], value) for name, value in before.items())
            assert all(value.isfinite().all() for value in after.values())

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_share"] for line in lines] == [0, 0, 1, 0, 1]
    assert [line["gradient_norm"] is None for line in lines] == [False, False, True, False, True]

    known = {key for shard in load_manifest(tmp_path / "day").shards for key in shard.keys}
    report = json.loads((run / "non_finite_step.json").read_text())
    assert report["step"] == 6
    assert [rank["non_finite"] for rank in report["ranks"]] == [[], ["lovasz"]]
    for rank in report["ranks"]:
        (keys,) = rank["keys"]
        assert [len(keys[name]) for name in ("source", "target")] == [2, 2]
        assert set(keys["source"]) <= known
    assert "step 3: not finite on rank 1: source logits; skipped, 1 in a row of at most 2" in done.stderr

    # Step 5 is the first in a row in its checkpoint too, so step 6 ends the run that resumes from it.
    assert json.loads((run / "checkpoints" / "step-00000005" / "state.json").read_text())["non_finite_steps"] == 1
    again = train("--resume")
    assert "step 6: not finite on rank 1: lovasz, the last of 2 in a row" in again.stderr
