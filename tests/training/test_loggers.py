"""A tracker is told every line, goes on with a resumed run, and cannot cost the run anything."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training.loggers import Trackers, check_trackers
from tests.support.disk import small_disk


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    """Accelerate asks its process state for rank 0."""
    from accelerate import PartialState

    PartialState(cpu=True)
    yield
    PartialState._reset_state()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the package `wandb`; gives what it was told."""
    told: dict[str, Any] = {"starts": [], "logged": [], "config": {}, "ended": 0}
    module = ModuleType("wandb")

    def init(**options: Any) -> SimpleNamespace:
        told["starts"].append(options)
        return SimpleNamespace(
            log=lambda values, step: told["logged"].append((step, values)),
            finish=lambda: told.update(ended=told["ended"] + 1),
        )

    module.init = init  # type: ignore[attr-defined]
    module.config = SimpleNamespace(update=lambda values, **_: told["config"].update(values))  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def demo(folder: Path, *overrides: str) -> RunConfig:
    config = load_config(resource("configs", "demo"), [f"output={folder}", *overrides])
    config.folder.mkdir(exist_ok=True)
    return config


def test_weights_and_biases_gets_the_lines_and_a_resumed_run_the_same_id(tmp_path: Path, wandb: dict[str, Any]) -> None:
    options = ["telemetry.project=streets", "telemetry.tracker_options.wandb.entity=us"]
    config = demo(tmp_path, "telemetry.trackers=[wandb]", *options)
    check_trackers(config)
    for start_step in (0, 20):
        trackers = Trackers(config, start_step)
        trackers.log({"loss": 1.5, "seconds/data": 0.1}, start_step + 20)
        trackers.close()
    first, second = wandb["starts"]
    assert first == second
    assert (first["project"], first["entity"], first["name"], first["resume"]) == ("streets", "us", "demo", "allow")
    assert len(first["id"]) >= 8
    assert wandb["logged"] == [(20, {"loss": 1.5, "seconds/data": 0.1}), (40, {"loss": 1.5, "seconds/data": 0.1})]
    assert wandb["config"]["training"]["steps"] == config.training.steps
    assert wandb["ended"] == 2
    other = demo(tmp_path, "name=other", "telemetry.trackers=[wandb]")
    Trackers(other, 0).close()
    assert wandb["starts"][-1]["id"] != first["id"]


def test_pictures_reach_the_trackers_as_images(tmp_path: Path, wandb: dict[str, Any]) -> None:
    sys.modules["wandb"].Image = lambda pixels: ("picture", pixels.shape)  # type: ignore[attr-defined]
    trackers = Trackers(demo(tmp_path, "telemetry.trackers=[wandb,tensorboard]"), 0)
    trackers.log_pictures({"pictures/source": np.full((4, 6, 3), 7, np.uint8)}, 2)
    trackers.close()
    assert wandb["logged"] == [(2, {"pictures/source": [("picture", (4, 6, 3))]})]
    events = EventAccumulator(str(tmp_path / "demo" / "tensorboard"))
    events.Reload()
    (event,) = events.Images("pictures/source")
    assert (event.step, event.height, event.width) == (2, 4, 6)


def test_tensorboard_lies_in_the_run_folder_and_drops_what_is_made_again(tmp_path: Path) -> None:
    config = demo(tmp_path)
    for start_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = Trackers(config, start_step)
        for step in steps:
            trackers.log({"loss": float(10 * start_step + step)}, step)
        trackers.close()
    events = EventAccumulator(str(tmp_path / "demo" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_pca.training.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"telemetry\.trackers: comet_ml is not installed; pip install comet-ml"):
        check_trackers(demo(tmp_path, "telemetry.trackers=[comet_ml]"))


def test_a_tracker_that_does_not_start_is_one_line_that_names_it(tmp_path: Path, wandb: dict[str, Any]) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("no such\nentity")

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"wandb does not start \(no such entity\).*tracker_options\.wandb"):
        Trackers(demo(tmp_path, "telemetry.trackers=[wandb]"), 0)


def test_a_full_disk_under_a_tracker_does_not_keep_the_run_from_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest has a hook of its own.
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    config = demo(tmp_path, "telemetry.trackers=[tensorboard]")
    with small_disk(config.folder / "tensorboard", size="64k") as disk:
        with (disk / "ballast").open("wb") as ballast, suppress(OSError):
            ballast.write(bytes(2**20))
        trackers = Trackers(config, 0)
        for step in range(200):
            trackers.log({"loss": 1.0}, step)
        trackers.close()
    assert "without tensorboard" in caplog.text
    assert len(caplog.records) == 1
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is threading.__excepthook__


def test_a_tracker_that_fails_later_is_dropped_and_the_others_go_on(
    tmp_path: Path, wandb: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = demo(tmp_path, "telemetry.trackers=[wandb,tensorboard]")
    trackers = Trackers(config, 0)
    # Its stand-in finds nowhere to put a line.
    del wandb["logged"]
    with caplog.at_level(logging.WARNING, logger="dist_pca.training"):
        for step in (1, 2):
            trackers.log({"loss": 1.0}, step)
    trackers.close()
    assert len([record for record in caplog.records if "without wandb" in record.message]) == 1
    events = EventAccumulator(str(config.folder / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("loss")) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("telemetry.trackers=[wandbee]", "wandb"),
        ("telemetry.tracker_options.wandb.mode=offline", "not one of telemetry.trackers"),
    ],
)
def test_trackers_that_make_no_sense_are_refused_at_start(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        demo(tmp_path, override)


def test_weights_and_biases_itself_takes_a_run_up_again(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is in the extra `dev`")
    config = demo(tmp_path, "telemetry.trackers=[wandb]", "telemetry.tracker_options.wandb.mode=offline")
    for start_step in (0, 1):
        trackers = Trackers(config, start_step)
        trackers.log({"loss": 1.0}, start_step + 1)
        trackers.close()
    run_id = json.loads((config.folder / "wandb.json").read_text())["id"]
    files = list((config.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
