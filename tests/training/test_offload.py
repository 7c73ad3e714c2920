"""Optimiser and parameters that are kept on the CPU train, are saved and go on as those that are not."""

import os
from pathlib import Path

import pytest
import torch

from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training.checkpoint import latest_checkpoint, read_state
from dist_pca.training.deepspeed_config import deepspeed_config, reconcile_launcher
from tests.support.runs import build_streets, launch
from tests.training.zero_runs import assert_equal, plain, run_config, through_deepspeed


def demo(*overrides: str) -> RunConfig:
    return load_config(resource("configs", "demo"), overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "optimizer", "parameters"),
    [
        pytest.param(2, "cpu", "none", marks=pytest.mark.exhaustive),
        pytest.param(1, "cpu", "none", marks=pytest.mark.exhaustive),
        pytest.param(3, "none", "cpu", marks=pytest.mark.exhaustive),
        (3, "cpu", "cpu"),
    ],
)
def test_what_is_offloaded_trains_and_goes_on_as_what_is_not(
    tmp_path: Path, stage: int, optimizer: str, parameters: str
) -> None:
    where = [f"training.offload.optimizer={optimizer}", f"training.offload.parameters={parameters}"]
    config = run_config(stage, "sgd", "training.ema_decay=0.6", *where)
    checkpoint = through_deepspeed(tmp_path, config, 2, last=2)
    checkpoint = through_deepspeed(tmp_path, config, 2, first=2, last=3, load=checkpoint)
    assert_equal(checkpoint, plain(config, 3), config)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_launcher_with_offload_trains_and_contradicts_a_run_without(tmp_path: Path) -> None:
    build_streets(tmp_path)
    launcher, processes = "accelerate/gpu_zero3_offload", ("--num_processes", "2")
    done = launch(tmp_path, "offloaded", "training.steps=2", launcher=launcher, launcher_options=processes)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "offloaded"
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    # The run folder and the checkpoint say what ran, not what the config left open.
    saved = [load_config(run / "config.yaml"), RunConfig.model_validate(read_state(checkpoint)["config"])]
    for training in (config.training for config in saved):
        assert training.zero_stage == 3
        assert (training.offload.optimizer, training.offload.parameters) == ("cpu", "cpu")
    # The same command is not refused: what the launcher filled in does not count as a changed key.
    done = launch(tmp_path, "offloaded", "training.steps=2", launcher=launcher, launcher_options=processes)
    assert done.returncode == 0, done.stderr
    assert "all 2 steps are done already" in done.stderr
    for part in ("optimizer", "parameters"):
        key = f"training.offload.{part}"
        done = launch(tmp_path, part, f"{key}=none", launcher=launcher, launcher_options=processes)
        assert f"{key} is none in the config and cpu in the launcher" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.offload.parameters=cpu"], "training.offload.parameters needs ZeRO stage 3, but the run uses 2"),
        (
            ["training.offload.optimizer=nvme", "training.offload.nvme_path=disk"],
            "training.offload.optimizer: nvme needs ZeRO stage 3",
        ),
        (
            [
                "training.offload.optimizer=nvme",
                "training.offload.nvme_path=disk",
                "training.zero_stage=3",
                "training.ema_decay=0.9",
            ],
            "training.ema_decay: .* set it to 0, or offload to cpu",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reconcile_launcher(demo(*overrides))


def test_nvme_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"training\.offload: nvme needs libaio"):
        reconcile_launcher(
            demo(
                *("training.zero_stage=3", "training.offload.optimizer=nvme", "training.offload.nvme_path=disk"),
                *("training.ema_decay=0", "objective.adapt=false"),
            )
        )


def test_parameters_on_nvme_are_refused_where_they_would_be_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.offload\.parameters: nvme rounds weights to bf16 on a CPU"):
        reconcile_launcher(
            demo("training.zero_stage=3", "training.offload.parameters=nvme", "training.offload.nvme_path=disk")
        )


def test_parameters_on_nvme_are_refused_beside_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    nvme = ("training.zero_stage=3", "training.offload.parameters=nvme", "training.offload.nvme_path=disk")
    with pytest.raises(UserError, match=r"training\.offload\.parameters: a teacher's weights"):
        reconcile_launcher(demo(*nvme, "training.ema_decay=0.9", "objective.self_training.weight=1"))


def test_nvme_without_a_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.offload\.nvme_path: missing"):
        demo("training.offload.optimizer=nvme")


def test_deepspeed_is_told_where_what_lies() -> None:
    config = demo(
        *("training.offload.optimizer=cpu", "training.offload.parameters=nvme", "training.offload.nvme_path=disk"),
        "training.zero_stage=3",
    )
    zero = deepspeed_config(config)["zero_optimization"]
    pinned = torch.cuda.is_available()
    assert zero["offload_optimizer"] == {"device": "cpu", "nvme_path": "disk", "pin_memory": pinned}
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "disk", "pin_memory": pinned}
    assert "offload_optimizer" not in deepspeed_config(reconcile_launcher(demo()))["zero_optimization"]


def test_a_compiled_backbone_is_refused_under_stage_3_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.compile does not work with ZeRO stage 3"):
        reconcile_launcher(demo("model.compile=true", "training.zero_stage=3"))
    monkeypatch.setitem(os.environ, "CXX", "no-such-compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.compile: needs a C\+\+ compiler"):
        reconcile_launcher(demo("model.compile=true"))
