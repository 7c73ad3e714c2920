"""What a run folder shows, without the machines that train it."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dist_pca.cli import app
from dist_pca.config import load_config, save_config
from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, write_exit_status
from dist_pca.resources import resource
from dist_pca.tools.cluster.status import read_status, remarks, saved_step, table
from dist_pca.training.run_folder import Launch, log_launch

STEPS = 100


def make_run(folder: Path, *, told: int = 0, saved: int = 0, starts: tuple[Launch, ...] = ()) -> Path:
    """A run folder of 100 steps as training leaves it, a line of metrics for every step."""
    run = folder / "run"
    run.mkdir()
    overrides = [f"training.steps={STEPS}", "training.log_every=1", "training.stall_timeout=60"]
    save_config(load_config(resource("configs", "demo"), overrides), run / "config.yaml")
    lines = [{"step": step, "loss": 1 / step, "seconds_per_step": 2.0} for step in range(1, told + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "starts.jsonl").write_text("".join(json.dumps(start._asdict()) + "\n" for start in starts))
    if saved:
        (run / "checkpoints").mkdir()
        (run / "checkpoints/latest").write_text(f"step-{saved:08d}\n")
    return run


def start(step: int = 0, *, host: str = "elsewhere", process: int = 1, job: str | None = None) -> Launch:
    return Launch(time.time(), step, 2, host, process, 0.0, job)


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, state: str, job: str = "7") -> None:
    (folder / "bin").mkdir()
    (folder / "bin/squeue").write_text(f"#!/bin/sh\necho {job} {state}\n")
    (folder / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (ExitCode.DONE, "finished"),
        (ExitCode.SAVED, "stopped"),
        (ExitCode.INTERRUPTED, "stopped"),
        (ExitCode.DIVERGED, "diverged"),
        (ExitCode.LOST_RANK, "failed"),
        (ExitCode.REFUSED, "failed"),
    ],
)
def test_a_run_that_said_how_it_ended_is_believed(tmp_path: Path, code: ExitCode, state: str) -> None:
    run = make_run(tmp_path, told=40, saved=30, starts=(start(), start(20)))
    write_exit_status(run, code, "so it is")
    status = read_status(run)
    assert (status.state, status.message, status.seconds_left) == (state, "so it is", None)
    assert (status.step, status.steps, status.saved_step, status.restarts) == (40, STEPS, 30, 1)
    assert status.metrics["loss"] == 1 / 40


def test_a_run_that_writes_is_running_and_tells_the_time_left(tmp_path: Path) -> None:
    status = read_status(make_run(tmp_path, told=40, starts=(start(),)))
    assert (status.state, status.seconds_left) == ("running", 120.0)


def test_a_run_on_another_machine_is_stale_when_longer_silent_than_a_living_one_can_be(tmp_path: Path) -> None:
    run = make_run(tmp_path, told=40, starts=(start(),))
    # The stall time-out, and three lines of one step of two seconds each.
    assert read_status(run, time.time() + 60).state == "running"
    stale = read_status(run, time.time() + 70)
    assert stale.state == "stale"
    assert "restart it" in stale.message


def test_on_its_own_machine_the_process_decides(tmp_path: Path) -> None:
    run = make_run(tmp_path, told=40)
    log_launch(run, 0, 1, {})
    assert read_status(run, time.time() + 10**6).state == "running"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    (run / "starts.jsonl").write_text(json.dumps(start(host=socket.gethostname(), process=ended.pid)._asdict()) + "\n")
    assert read_status(run).state == "stale"


def test_another_process_of_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    (mine,) = [start(host=socket.gethostname(), process=os.getpid())]
    assert read_status(make_run(tmp_path, told=40, starts=(mine,))).state == "stale"


@pytest.mark.parametrize(("queue", "state"), [("RUNNING", "running"), ("COMPLETING", "running"), ("PENDING", "queued")])
def test_under_slurm_the_queue_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: str, state: str) -> None:
    fake_squeue(tmp_path, monkeypatch, queue)
    status = read_status(make_run(tmp_path, told=40, starts=(start(job="7"),)), time.time() + 10**6)
    assert (status.state, status.job, status.job_state) == (state, "7", queue)


def test_the_last_task_of_an_array_is_told_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(tmp_path, monkeypatch, "RUNNING; echo 7 PENDING; echo 9 RUNNING", job="8")
    assert read_status(make_run(tmp_path, told=40, starts=(start(job="7"),))).job_state == "PENDING"


def test_a_saved_run_whose_job_waits_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(tmp_path, monkeypatch, "PENDING")
    run = make_run(tmp_path, told=40, saved=40, starts=(start(job="7"),))
    write_exit_status(run, ExitCode.SAVED, "out of time")
    status = read_status(run)
    assert (status.state, status.message) == ("queued", "out of time")


@pytest.mark.parametrize(("queue", "state"), [("PENDING", "queued"), ("", "failed")])
def test_a_submitted_run_that_has_not_begun_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: str, state: str
) -> None:
    fake_squeue(tmp_path, monkeypatch, queue)
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/12.sbatch").touch()
    status = read_status(tmp_path / "run")
    assert (status.state, status.job, status.steps) == (state, "12", 0)


def test_a_run_killed_after_its_last_checkpoint_is_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, told=STEPS, saved=STEPS, starts=(start(),))
    assert read_status(run, time.time() + 10**6).state == "finished"


def test_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, told=40, starts=(start(),))
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 41, "lo')
    assert read_status(run).step == 40


def test_the_last_of_many_long_lines_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    lines = [{"step": step, "kept_per_class": dict.fromkeys(map(str, range(200)), 0.5)} for step in range(1, 91)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_status(run).step == 90


@pytest.mark.parametrize("content", ["", "nonsense", "step-"])
def test_a_damaged_pointer_counts_as_nothing_saved(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path, saved=3)
    (run / "checkpoints/latest").write_text(content)
    assert saved_step(run) == 0


def test_without_the_pointer_the_newest_checkpoint_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path, saved=3)
    (run / "checkpoints/latest").unlink()
    assert saved_step(run) == 0
    for name in ("step-00000009", "step-00000012", "step-00000099.mine"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "state.json").touch()
    (run / "checkpoints/step-00000050").mkdir()
    assert saved_step(run) == 12


def test_what_is_no_run_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder \(no config.yaml\)"):
        read_status(tmp_path)


def test_several_runs_make_one_table_or_one_list(tmp_path: Path) -> None:
    names = ("first", "second")
    for name in names:
        (tmp_path / name).mkdir()
        write_exit_status(make_run(tmp_path / name, told=7, starts=(start(),)), ExitCode.DONE, "done [so]")
    runs = [str(tmp_path / name / "run") for name in names]
    statuses = [read_status(Path(run)) for run in runs]
    console = Console(width=80, record=True, file=io.StringIO(), markup=False)
    console.print(table(statuses))
    shown = console.export_text()
    assert "│ first/run  │ finished │ 7/100 │" in shown
    assert "│ second/run │" in shown
    assert remarks(statuses) == [f"{run}: done [so]" for run in runs]
    printed = CliRunner().invoke(app, ["status", *runs])
    assert all(f"{run}: done [so]" in printed.output for run in runs)
    printed = CliRunner().invoke(app, ["status", *runs, "--json"])
    found = json.loads(printed.output)
    assert [one["run"] for one in found] == runs
    assert {"state", "step", "steps", "saved_step", "seconds_left", "restarts", "metrics"} <= found[0].keys()
