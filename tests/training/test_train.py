"""Whole runs under `accelerate launch`: two processes, DeepSpeed, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_pca.resources import resource
from dist_pca.training.metrics import TIMING
from tests.support.runs import build_streets, launch
from tests.training.test_metrics import documented

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    build_streets(folder)
    return folder


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMING}


def test_a_run_trains_logs_every_term_and_can_be_scored(streets: Path) -> None:
    done = launch(streets, "whole")
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    lines = metrics(streets, "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert not any(name.startswith("association") for name in lines[0])
    others = {
        "source_contrast",
        "class_statistics",
        "feature_distance",
        "dice",
        "smoothness_source",
        "smoothness_target",
    }
    others |= {"validation_mean_iou", "validation_iou"}
    later = {"self_training", "masked_consistency", "confident_share", "pseudo_label_accuracy"}
    assert set(lines[-1]) == documented() - others - later
    # Where an untrained network keeps no cycle, these are undefined.
    without_cycles = {
        f"{name}_{level}"
        for level in ("features", "predictions")
        for name in ("kept_correct_ratio", "mutual_information_bound")
        if lines[-1][f"kept_{level}"] == 0
    }
    assert {name for name, value in lines[-1].items() if value is None} <= {"flop_utilisation", *without_cycles}
    for level in ("features", "predictions"):
        ratios = [lines[-1][f"{ratio}_ratio_{level}"] for ratio in ("cover", "consistent", "correct")]
        assert all(0 <= ratio <= 1 for ratio in ratios)
        assert sum(lines[-1][f"kept_per_class_{level}"].values()) == pytest.approx(lines[-1][f"kept_{level}"])
    run = streets / "runs" / "whole"
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    command = [sys.executable, "-m", "dist_pca.cli", "evaluate", str(run), "--shards", str(streets / "dusk"), "--json"]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    scores = json.loads(alone.stdout)
    assert scores["images"] == 6
    assert 0 <= scores["mean_iou"] <= 1
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(resource("launch", "accelerate/cpu")), "-m"]
    together = subprocess.run(
        [sys.executable, *launcher, *command[2:]],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(together.stdout) == scores


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.exhaustive), 2, pytest.param(3, marks=pytest.mark.exhaustive)]
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(streets: Path, stage: int) -> None:
    launcher = [f"training.zero_stage={stage}"]
    whole, broken = f"whole{stage}", f"broken{stage}"
    for name in (whole, broken):
        done = launch_at(stage, streets, name, *launcher)
        assert done.returncode == 0, done.stderr
    # The broken run lost everything after step 3.
    folder = streets / "runs" / broken / "checkpoints"
    (folder / "latest").write_text("step-00000003\n")
    (folder / "step-00000006" / "model.safetensors").unlink()
    done = launch_at(stage, streets, broken, *launcher)
    assert done.returncode == 0, done.stderr
    expected, found = weights(streets, whole, 6), weights(streets, broken, 6)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(map(without_time, metrics(streets, broken))) == list(map(without_time, metrics(streets, whole)))


def launch_at(stage: int, folder: Path, name: str, *more: str) -> "subprocess.CompletedProcess[str]":
    return launch(folder, name, *more, launcher_options=("--zero_stage", str(stage)))


def test_bf16_and_accumulation_train(streets: Path) -> None:
    done = launch(streets, "bf16", "training.precision=bf16", "training.accumulation=2", "training.steps=3")
    assert done.returncode == 0, done.stderr
    assert all(torch.isfinite(tensor).all() for tensor in weights(streets, "bf16", 3).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.precision=fp16", "training.precision: fp16 does not run on CPU; use bf16 or fp32"),
        *(
            pytest.param(*values, marks=pytest.mark.exhaustive)
            for values in (
                ("data.crop=[512,512]", "data.crop"),
                ("training.source_batch=3", "training.source_batch"),
                ("training.stepz=3", "the nearest is training.steps"),
                ("model.backbone=resnet5000", "resnet5000"),
                ("data.source=nowhere", "nowhere"),
            )
        ),
    ],
)
def test_what_cannot_run_ends_with_one_clear_line_and_nothing_written(
    streets: Path, override: str, message: str
) -> None:
    done = launch(streets, "refused", override)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, done.stderr
    assert message in said[0]
    assert not (streets / "runs" / "refused").exists()


def test_a_finished_run_is_not_trained_over(streets: Path) -> None:
    assert launch(streets, "twice", "training.steps=1").returncode == 0
    before = (streets / "runs" / "twice" / "metrics.jsonl").read_bytes()
    done = launch(streets, "twice", "training.steps=1")
    assert done.returncode == 0
    assert "all 1 steps are done already" in done.stderr
    assert (streets / "runs" / "twice" / "metrics.jsonl").read_bytes() == before
