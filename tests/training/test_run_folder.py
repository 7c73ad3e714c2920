"""A run resumes in its own folder, and in no folder of another run; its launches are logged there."""

import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import Manifest, load_manifest, save_manifest
from dist_pca.tools.demo.streets import DAY, write_streets
from dist_pca.training.accumulation import fit_batches
from dist_pca.training.checkpoint import code_version, latest_checkpoint, pointed_at
from dist_pca.training.prepare import prepare_run
from dist_pca.training.run_folder import (
    RunData,
    check_resume,
    create_run,
    log_launch,
    read_classes,
    read_launch_log,
)


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


def test_a_run_goes_on_whose_config_lacks_keys_that_came_later(made: Path) -> None:
    file = demo(made).folder / "config.yaml"
    written = file.read_text()
    lines = written.splitlines(keepends=True)
    older = [line for line in lines if line.split(":")[0].strip() not in ("source_shorter_edge", "ignore_sides")]
    assert len(older) == len(lines) - 2
    file.write_text("".join(older))
    check_resume(demo(made), None)
    with pytest.raises(UserError, match=r"data\.source_shorter_edge: None -> \[150, 150\]"):
        check_resume(demo(made, "data.source_shorter_edge=[150,150]"), None)


@pytest.mark.parametrize(
    "override",
    [
        *("training.zero_stage=3", "training.time_limit=08:00:00", "data.workers=7", "training.log_every=3"),
        "data.cache.folder=elsewhere",
    ],
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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("training.steps=200",),
            r"rate after step 80: 0\.0002 -> 0\.0006 \(schedule\.horizon=100 and a schedule\.minimum keep it low\)$",
        ),
        (("training.steps=200", "schedule.name=constant"), r"the learning rate after step 80: 0\.0002 -> 0\.001$"),
        (("training.steps=200", "schedule.horizon=100", "schedule.minimum=0.2"), None),
        (
            ("training.steps=200", "schedule.horizon=100", "schedule.minimum=0.5"),
            r"the learning rate after step 80: 0\.0002 -> 0\.0005$",
        ),
        (("optimizer.lr=0.01",), r"the learning rate after step 80: 0\.0002 -> 0\.002$"),
        (("seed=7",), None),
    ],
)
def test_a_change_of_the_learning_rate_is_named_with_both_rates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], line: str | None
) -> None:
    usual = ("optimizer.lr=0.001", "training.steps=100", "schedule.power=1", "schedule.warmup_steps=0")
    made = demo(tmp_path, *usual)
    checkpoint = made.folder / "checkpoints" / "step-00000080"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 80}')
    save_config(made, made.folder / "config.yaml")
    changed = demo(tmp_path, *usual, *overrides)
    with caplog.at_level("INFO", logger="dist_pca.training"):
        check_resume(changed, True)
    rates = [message for message in caplog.messages if "learning rate" in message]
    assert len(rates) == (line is not None)
    with pytest.raises(UserError) as refused:
        check_resume(changed, None)
    assert ("learning rate" in str(refused.value)) == (line is not None)
    if line is not None:
        assert re.search(line, rates[0])


def test_batches_per_rank_do_not_change_the_rate_of_a_run_that_keeps_them(tmp_path: Path) -> None:
    batches = ("training.source_batch_per_rank=3", "training.target_batch_per_rank=3")
    given = (*batches, "schedule.batch_scaling=linear", "schedule.base_batch=6")
    checkpoint = demo(tmp_path).folder / "checkpoints" / "step-00000080"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 80, "world_size": 2}')
    save_config(demo(tmp_path, *given), demo(tmp_path).folder / "config.yaml")
    with pytest.raises(UserError, match="seed: 0 -> 7") as refused:
        check_resume(fit_batches(demo(tmp_path, *given, "seed=7"), 2), None)
    assert "learning rate" not in str(refused.value)


def test_resume_consents_to_changed_keys_and_no_resume_to_no_run(made: Path) -> None:
    check_resume(demo(made, "optimizer.lr=0.5"), True)
    with pytest.raises(UserError, match="already holds a run"):
        check_resume(demo(made), False)


@pytest.mark.parametrize("resume", [None, True, False])
def test_a_folder_without_a_run_starts_one(tmp_path: Path, resume: bool | None) -> None:
    check_resume(demo(tmp_path), resume)


def test_a_table_with_a_class_twice_is_refused(tmp_path: Path) -> None:
    road = {"name": "road", "color": [128, 64, 128]}
    (tmp_path / "classes.json").write_text(json.dumps([road, road]))
    with pytest.raises(
        UserError, match=r"classes\.json: cannot be read \(class 1: 'road' is listed twice\); remove it"
    ):
        read_classes(tmp_path)


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
    create_run(plan.config, RunData(plan.classes, plan.sources, plan.targets), world_size=1, start_step=0)
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


def test_validation_shards_with_another_spelling_of_a_class_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_streets(tmp_path / "raw", DAY, split="day", indices=range(2), seed=0, size=(64, 96))
    for name in ("day", "test"):
        manifest = build_shards("folder", tmp_path / "raw", tmp_path / name, workers=1)
    save_manifest(replace(manifest, classes=(replace(manifest.classes[0], name="Road"), *manifest.classes[1:])))
    keys = (
        *(f"data.source={tmp_path}/day", f"data.target={tmp_path}/day", f"data.validation={tmp_path}/test"),
        *("data.shorter_edge=[40,56]", "data.crop=[40,56]"),
        *("model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null"),
    )
    with caplog.at_level("INFO"):
        prepare_run(demo(tmp_path, *keys), world_size=1, resume=None)
    assert f"data.validation: shards {tmp_path}/test: no class 'road'; the nearest is 'Road'" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        prepare_run(demo(tmp_path, *keys, "evaluation.class_map={Road: road}"), world_size=1, resume=None)
    assert "Road" not in caplog.text


def test_going_on_with_other_code_is_told(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = demo(made).folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    with caplog.at_level("INFO", "dist_pca.training"):
        (checkpoint / "state.json").write_text(f'{{"step": 4, "code": "{code_version()}"}}')
        check_resume(demo(made), None)
        assert not any("dist-pca" in message for message in caplog.messages)
        (checkpoint / "state.json").write_text('{"step": 4, "code": "0.0.0+abc"}')
        check_resume(demo(made), None)
    assert f"resuming with dist-pca {code_version()}; step-00000004 was saved by 0.0.0+abc" in caplog.messages


def checkpoint(run: Path, step: int, **state: object) -> Path:
    """A folder that looks like a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "code": code_version(), **state}))
    return folder


def streets(folder: Path, name: str, seed: int) -> Manifest:
    write_streets(folder / "raw" / name, DAY, split=name, indices=range(2), seed=seed, size=(64, 96))
    build_shards("folder", folder / "raw" / name, folder / name, workers=1)
    return load_manifest(folder / name)


def test_files_that_are_missing_and_what_that_means_are_named(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = demo(made).folder
    (checkpoint(run, 4).parent / "latest").write_text("step-00000004")
    (run / "metrics.jsonl").touch()
    with caplog.at_level("INFO", "dist_pca.training"):
        check_resume(demo(made), None)
    missing = [message.partition(": ") for message in caplog.messages]
    assert [what for what, _, _ in missing] == [f"{run / name} is missing" for name in ("classes.json", "data.json")]
    assert all("are not compared" in consequence for _, _, consequence in missing)


def test_a_missing_pointer_resumes_from_the_newest_that_can_be_read(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = demo(made).folder
    found = checkpoint(run, 4)
    (checkpoint(run, 8) / "state.json").write_text("{")
    with caplog.at_level("INFO", "dist_pca.training"):
        check_resume(demo(made), None)
    assert caplog.messages[0] == f"{run}/checkpoints/latest is missing; resuming from step-00000004, the newest"
    assert latest_checkpoint(run / "checkpoints") == found


def test_a_folder_whose_checkpoints_can_not_be_read_is_refused(made: Path) -> None:
    (checkpoint(demo(made).folder, 8) / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"none of step-00000008 can be read; choose another name="):
        check_resume(demo(made), True)


def test_without_its_config_a_run_is_compared_with_that_of_its_checkpoint(made: Path) -> None:
    run = demo(made).folder
    checkpoint(run, 4, config=demo(made).model_dump(mode="json"))
    (run / "config.yaml").unlink()
    check_resume(demo(made), None)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.001 -> 0\.5"):
        check_resume(demo(made, "optimizer.lr=0.5"), None)


def test_steps_that_were_logged_are_not_overwritten_for_lack_of_checkpoints(made: Path) -> None:
    config = demo(made, "training.checkpoint_every=10")
    save_config(config, config.folder / "config.yaml")
    lines = config.folder / "metrics.jsonl"
    # The first checkpoint may still have been in writing when the run was killed.
    lines.write_text('{"step": 20}\n{"step": 2')
    check_resume(config, None)
    lines.write_text('{"step": 20}\n{"step": 21}\n')
    with pytest.raises(UserError, match=r"has logged step 21, but has no checkpoint; put checkpoints/ back"):
        check_resume(config, True)


def test_checkpoints_ahead_are_set_aside_and_the_rest_is_left_alone(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = demo(made)
    checkpoints = config.folder / "checkpoints"
    for step in (4, 8, 12):
        checkpoint(config.folder, step, mean_iou=step / 20)
    (checkpoints / "best").write_text("step-00000012\n")
    for foreign in ("step-00000012.mine", "step-00000016", ".step-00000012.partial", "set-aside/step-00000012"):
        (checkpoints / foreign).mkdir(parents=True)
    (checkpoints / "step-notes.txt").write_text("mine")
    create_run(config, RunData((), (), ()), world_size=1, start_step=4)
    assert sorted(path.relative_to(checkpoints).as_posix() for path in checkpoints.glob("*")) == [
        *("best", "set-aside", "step-00000004", "step-00000012.mine", "step-00000016", "step-notes.txt")
    ]
    assert sorted(path.name for path in (checkpoints / "set-aside").iterdir()) == [
        *("step-00000008", "step-00000012", "step-00000012.2")
    ]
    assert (checkpoints / "set-aside" / "step-00000012.2" / "state.json").is_file()
    assert pointed_at(checkpoints, "best") == checkpoints / "step-00000004"
    assert len(caplog.messages) == 2


def test_other_shards_need_consent_and_other_classes_another_name(
    tmp_path: Path, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = streets(tmp_path, "first", 0), streets(tmp_path, "second", 1)
    config, trained = demo(made), RunData(first.classes, (first,), (second,))
    create_run(config, trained, world_size=1, start_step=0)
    moved = replace(first, location="elsewhere")
    check_resume(config, None, trained._replace(sources=(moved,)))
    other = trained._replace(sources=(second,))
    difference = r"data\.source: other shards, 2 samples in \S+/first -> 2 in \S+/second"
    with pytest.raises(UserError, match=difference):
        check_resume(config, None, other)
    with caplog.at_level("INFO", "dist_pca.training"):
        check_resume(config, True, other)
    assert "resuming with data.source: other shards" in caplog.text
    permuted = trained._replace(classes=(first.classes[1], first.classes[0], *first.classes[2:]))
    names = [info.name for info in first.classes]
    with pytest.raises(UserError, match=f"first at train id 0: {names[0]} there, {names[1]} in the shards"):
        check_resume(config, True, permuted)
    with pytest.raises(UserError, match=f"at train id {len(names) - 1}: {names[-1]} there, no class in the shards"):
        check_resume(config, True, trained._replace(classes=first.classes[:-1]))


@pytest.mark.parametrize("name", ["classes.json", "data.json"])
def test_damaged_tables_are_named(tmp_path: Path, made: Path, name: str) -> None:
    manifest = streets(tmp_path, "first", 0)
    data = RunData(manifest.classes, (manifest,), ())
    create_run(demo(made), data, world_size=1, start_step=0)
    file = demo(made).folder / name
    file.write_text(file.read_text()[:20])
    with pytest.raises(UserError, match=rf"{name}: cannot be read .*remove it") as refused:
        check_resume(demo(made), True, data)
    assert "\n" not in str(refused.value)
    file.unlink()
    check_resume(demo(made), None, data)


def test_each_start_is_a_line_with_its_job_and_step(tmp_path: Path) -> None:
    log_launch(tmp_path, 0, 2, {"SLURM_JOB_ID": "7"})
    log_launch(tmp_path, 40, 4, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    log_launch(tmp_path, 60, 1, {})
    found = read_launch_log(tmp_path)
    assert [(start.step, start.world_size, start.job, start.restart) for start in found] == [
        (0, 2, "7", 0),
        (40, 4, "7", 1),
        (60, 1, None, 0),
    ]
    assert {(start.process, start.create_time) for start in found} == {(os.getpid(), psutil.Process().create_time())}


def test_a_run_that_never_started_has_none_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    assert read_launch_log(tmp_path) == []
    log_launch(tmp_path, 0, 2, {})
    with (tmp_path / "starts.jsonl").open("a") as lines:
        lines.write('{"time": 17')
    assert len(read_launch_log(tmp_path)) == 1
