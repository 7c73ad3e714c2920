"""What has become of a run, read from its folder alone."""

import json
import math
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from rich.table import Column, Table
from rich.text import Text

from dist_pca.config import load_config
from dist_pca.config.aliases import rename_metrics
from dist_pca.config.training import TrainingConfig
from dist_pca.console import duration, paths_in_common
from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.training.run_folder import Launch, read_launch_log

State = Literal["queued", "running", "stale", "finished", "stopped", "diverged", "failed"]
SHOWN = {"loss": "loss", "images_per_second": "images/s"}
"""Metrics in the table, and their headings."""
_STYLES = {"running": "green", "finished": "bold green", "stale": "red", "diverged": "red", "failed": "red"}
_ENDED: dict[int, State] = {
    ExitCode.DONE: "finished",
    ExitCode.SAVED: "stopped",
    ExitCode.INTERRUPTED: "stopped",
    ExitCode.DIVERGED: "diverged",
}
_LATE_LINES = 3
"""Lines of metrics.jsonl that may be overdue before a run counts as stale."""
_TAIL_BYTES = 2**16


class Status(NamedTuple):
    """A run, as its folder shows it."""

    run: str
    state: State
    """State of the run. `queued`: waits in SLURM's queue to start or resume. `stale`: has neither recorded an end nor
    written anything for a while."""
    step: int
    """Last step that is logged in metrics.jsonl, or saved."""
    steps: int
    """Steps of the run; 0 where it has not been started yet."""
    saved_step: int
    """Step of the newest checkpoint; 0 without one."""
    seconds_left: float | None
    """Seconds left of a running run, once it has logged its speed."""
    silent: float | None
    """Seconds since the run last wrote anything; None where it never did."""
    starts: int
    restarts: int
    job: str | None
    """SLURM's number of the last start's job."""
    job_state: str | None
    """What SLURM's queue says of it; None where it is not in the queue, or there is none here."""
    metrics: dict[str, Any]
    """The last line of metrics.jsonl."""
    message: str
    """How it ended, or what is to be done."""


def saved_step(folder: Path) -> int:
    """Step from which a run resumes: of the checkpoint that `latest` names, else of the newest; 0 without one."""
    checkpoints = folder / "checkpoints"
    try:
        if not (checkpoints / "latest").exists():
            steps = (state.parent.name.removeprefix("step-") for state in checkpoints.glob("step-*/state.json"))
            return max((int(step) for step in steps if step.isdecimal()), default=0)
        return int((checkpoints / "latest").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def planned_steps(folder: Path) -> int:
    """Steps of the run that a folder holds; 0 where it has not been started yet."""
    training = _training(folder)
    return training.steps if isinstance(training, TrainingConfig) else 0


def read_status(folder: Path, now: float | None = None) -> Status:
    """See what has become of a run.

    Args:
        folder: The run folder.
        now: Unix time; None takes the clock's.

    Raises:
        UserError: the folder holds no run, and none is queued for it.
    """
    now = time.time() if now is None else now
    starts, submitted = (
        read_launch_log(folder),
        sorted(folder.glob("slurm/*.sbatch"), key=lambda path: path.stat().st_mtime),
    )
    if not (folder / "config.yaml").is_file() and not submitted:
        raise UserError(f"{folder}: not a run folder (no config.yaml); give a folder that training wrote")
    training, saved, metrics = _training(folder), saved_step(folder), _last_metrics(folder / "metrics.jsonl")
    steps, step = planned_steps(folder), max(saved, int(_number(metrics, "step")))
    job = submitted[-1].stem if submitted else None
    # Unless a later start came from elsewhere.
    if starts and (job is None or starts[-1].time > submitted[-1].stat().st_mtime):
        job = starts[-1].job
    job_state = None if job is None else _job_state(job)
    silent, outcome = _silence(folder, now), read_exit_status(folder)
    message = "" if outcome is None else outcome.message
    state: State
    if outcome is not None:
        state = _ENDED.get(outcome.code, "failed")
    elif 0 < steps <= saved:
        state = "finished"
    elif isinstance(training, str):
        state, message = "failed", training
    elif training is None:
        state, message = "failed", f"its job never began and is not in the queue; see {folder / 'slurm'}"
    elif _is_at_work(starts, job_state, silent, training, metrics):
        state = "running"
    else:
        state, message = "stale", "no sign of life; restart it, and it resumes from its newest checkpoint"
    if state != "finished" and job_state == "PENDING":
        state, message = "queued", "" if outcome is None else message
    pace = _number(metrics, "seconds_per_step")
    return Status(
        run=str(folder),
        state=state,
        step=step,
        steps=steps,
        saved_step=saved,
        seconds_left=pace * (steps - step) if state == "running" and pace else None,
        silent=silent,
        starts=len(starts),
        restarts=max(0, len(starts) - 1),
        job=job,
        job_state=job_state,
        metrics=metrics,
        message=message,
    )


def to_json(statuses: list[Status]) -> str:
    """A JSON list with one object for each run."""
    return json.dumps([status._asdict() for status in statuses], indent=2)


def table(statuses: list[Status]) -> Table:
    """One row for each run, named by its folder inside the folder that all share."""
    shown = Table(Column("run", overflow="fold"), "state", "step", "left", *SHOWN.values(), "restarts")
    for status, run in zip(statuses, paths_in_common([status.run for status in statuses]), strict=True):
        numbers = (status.metrics.get(name) for name in SHOWN)
        shown.add_row(
            run,
            Text(status.state, _STYLES.get(status.state, "")),
            f"{status.step:,}/{status.steps:,}",
            "" if status.seconds_left is None else duration(status.seconds_left),
            *(f"{number:.4g}" if isinstance(number, (int, float)) else "" for number in numbers),
            str(status.restarts),
        )
    return shown


def remarks(statuses: list[Status]) -> list[str]:
    """A line for each run of which there is more to say than its row does: how it ended, or when it was last seen."""
    lines = []
    for status in statuses:
        seen = status.state in ("running", "stale") and status.silent is not None
        parts = [
            status.message.removeprefix(f"{status.run}: "),
            f"last sign {duration(status.silent or 0)} ago" if seen else "",
            f"job {status.job} {status.job_state}" if status.job_state else "",
        ]
        if any(parts):
            lines.append(f"{status.run}: {'; '.join(filter(None, parts))}")
    return lines


def _is_at_work(
    starts: list[Launch],
    job_state: str | None,
    silent: float | None,
    training: TrainingConfig,
    metrics: Mapping[str, Any],
) -> bool:
    """Whether a run that has not said how it ended is still at work, as far as can be seen from here."""
    if job_state is not None:
        return True
    alive = _is_alive(starts[-1]) if starts and starts[-1].job is None else None
    if alive is not None:
        return alive
    # From another machine only its writing shows; a rank that does not move ends the run within the stall time-out.
    line = training.log_every * _number(metrics, "seconds_per_step")
    return silent is not None and silent < training.stall_timeout + _LATE_LINES * line


def _is_alive(launch: Launch) -> bool | None:
    """Whether rank 0 of a launch still runs; None if it ran on another machine."""
    if launch.host != socket.gethostname():
        return None
    try:
        return bool(abs(psutil.Process(launch.process).create_time() - launch.create_time) < 1)
    except psutil.NoSuchProcess:
        return False


def _training(folder: Path) -> TrainingConfig | str | None:
    """The section `training` of a run folder's config; a message if it cannot be read, None if there is none."""
    if not (folder / "config.yaml").is_file():
        return None
    try:
        return load_config(folder / "config.yaml").training
    except UserError as error:
        return str(error)


def _number(metrics: Mapping[str, Any], name: str) -> float:
    """A finite number of a line of metrics; 0 if there is none of that name."""
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _last_metrics(path: Path) -> dict[str, Any]:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            # A line can be cut short: the last one while it is written, the first one here.
            with suppress(ValueError, RecursionError):
                if isinstance(values := json.loads(line), dict):
                    return rename_metrics(values)
    return {}


def _silence(folder: Path, now: float) -> float | None:
    signs = (folder / name for name in ("starts.jsonl", "metrics.jsonl", "checkpoints/latest", "exit.json"))
    written = [path.stat().st_mtime for path in signs if path.is_file()]
    return max(0.0, now - max(written)) if written else None


def _job_state(job: str) -> str | None:
    command = ["squeue", "--noheader", "--format=%A %T", f"--job={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # The last task of an array has the array's number, by which all of its tasks are listed.
    states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
    return states.get(job) or next(iter(states.values()), None)
