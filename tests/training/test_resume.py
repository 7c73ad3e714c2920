"""A run goes on in its own folder, and in no other run's."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.tools.demo.streets import DAY, write_streets
from dist_pca.training.checkpoint import code_version
from dist_pca.training.prepare import prepare_run
from dist_pca.training.resume import check_resume
from dist_pca.training.run import create_run


def demo(folder: Path, *overrides: str) -> RunConfig:
    return load_config(resource("configs", "demo"), [f"output={folder}", *overrides])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    config = demo(tmp_path)
    config.folder.mkdir()
    save_config(config, config.folder / "config.yaml")
    return tmp_path


def test_the_same_run_goes_on_by_itself(made: Path) -> None:
    check_resume(demo(made), None)


@pytest.mark.parametrize(
    "override", ["training.zero_stage=3", "training.time_limit=08:00:00", "data.workers=7", "training.log_every=3"]
)
def test_keys_that_say_where_and_how_a_run_is_made_may_change(made: Path, override: str) -> None:
    check_resume(demo(made, override), None)


@pytest.mark.parametrize("cached", [True, False])
def test_accumulation_may_change_where_an_update_has_one_loss(tmp_path: Path, cached: bool) -> None:
    before = demo(tmp_path, f"training.grad_cache={cached}")
    before.folder.mkdir()
    save_config(before, before.folder / "config.yaml")
    after = demo(tmp_path, f"training.grad_cache={cached}", "training.accumulation=2")
    with nullcontext() if cached else pytest.raises(UserError, match=r"training\.accumulation: 1 -> 2"):
        check_resume(after, None)


def test_another_config_is_refused_with_every_key_that_differs(made: Path) -> None:
    changed = demo(made, "optimizer.lr=0.5", "objective.association.scope=rank", "training.log_every=3")
    with pytest.raises(UserError) as refused:
        check_resume(changed, None)
    message = str(refused.value)
    assert "optimizer.lr: 0.001 -> 0.5" in message
    assert "objective.association.scope: world -> rank" in message
    assert "log_every" not in message
    assert "\n" not in message


def test_resume_consents_to_changed_keys_and_no_resume_to_no_run(made: Path) -> None:
    check_resume(demo(made, "optimizer.lr=0.5"), True)
    with pytest.raises(UserError, match="already holds a run"):
        check_resume(demo(made), False)


@pytest.mark.parametrize("resume", [None, True, False])
def test_a_folder_without_a_run_starts_one(tmp_path: Path, resume: bool | None) -> None:
    check_resume(demo(tmp_path), resume)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_the_launchers_stage_is_the_runs_and_no_changed_key_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for name in ("day", "dusk"):
        write_streets(tmp_path / f"raw_{name}", DAY, split=name, indices=range(2), seed=0, size=(64, 96))
        build_shards("folder", tmp_path / f"raw_{name}", tmp_path / name, workers=1)
    config = demo(
        tmp_path,
        *(f"data.source={tmp_path}/day", f"data.target={tmp_path}/dusk"),
        *("data.shorter_edge=[40,56]", "data.crop=[40,56]"),
        *("model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null"),
    )
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    plan = prepare_run(config, world_size=1, resume=None)
    create_run(plan.config, plan.classes, world_size=1, start_step=0)
    assert load_config(config.folder / "config.yaml").training.zero_stage == int(stage)
    assert prepare_run(config, world_size=1, resume=None).config == plan.config


def test_a_world_that_cannot_share_the_batch_is_refused_with_the_sizes_that_would_work(tmp_path: Path) -> None:
    for name in ("day", "dusk"):
        write_streets(tmp_path / f"raw_{name}", DAY, split=name, indices=range(2), seed=0, size=(64, 96))
        build_shards("folder", tmp_path / f"raw_{name}", tmp_path / name, workers=1)
    config = demo(
        tmp_path,
        f"data.source={tmp_path}/day",
        f"data.target={tmp_path}/dusk",
        "data.shorter_edge=[40,56]",
        "data.crop=[40,56]",
        "training.source_batch=12",
        "training.target_batch=12",
        "training.accumulation=2",
    )
    message = (
        r"training\.source_batch: 12 samples cannot be divided evenly among 4 ranks x 2 micro-batches; "
        r"use 8 or 16 samples or a world size out of \[1, 2, 3, 6\]"
    )
    with pytest.raises(UserError, match=message):
        prepare_run(config, world_size=4, resume=None)


def test_going_on_with_other_code_is_told(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = demo(made).folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    with caplog.at_level("INFO", "dist_pca.training"):
        (checkpoint / "state.json").write_text(f'{{"step": 4, "code": "{code_version()}"}}')
        check_resume(demo(made), None)
        assert caplog.messages == []
        (checkpoint / "state.json").write_text('{"step": 4, "code": "0.0.0+abc"}')
        check_resume(demo(made), None)
    assert caplog.messages == [f"resuming with dist-pca {code_version()}; step-00000004 was saved by 0.0.0+abc"]
