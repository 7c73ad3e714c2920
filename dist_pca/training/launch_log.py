"""The launch log, `starts.jsonl` in the run folder: when, where and from which step a run was launched."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

_OLD_FIELDS = {"born": "create_time"}
"""New field by the one that version 0.1 wrote."""


class Launch(NamedTuple):
    """One line of the launch log."""

    time: float
    """Unix time."""
    step: int
    """Steps trained before."""
    world_size: int
    host: str
    """Host name of rank 0."""
    process: int
    """Process id of rank 0."""
    create_time: float
    """Unix time at which that process was created, since process ids are reused."""
    job: str | None = None
    """SLURM's job id, if any."""
    restart: int = 0
    """Number of times SLURM had requeued the job."""


def log_launch(folder: Path, step: int, world_size: int, environment: Mapping[str, str]) -> None:
    """Append a line to the launch log; to be called on rank 0."""
    process = psutil.Process()
    launch = Launch(
        time.time(),
        step,
        world_size,
        socket.gethostname(),
        process.pid,
        process.create_time(),
        environment.get("SLURM_JOB_ID"),
        int(environment.get("SLURM_RESTART_COUNT", 0)),
    )
    with (folder / "starts.jsonl").open("a") as lines:
        lines.write(json.dumps(launch._asdict()) + "\n")


def read_launch_log(folder: Path) -> list[Launch]:
    """Read all launches of a run, oldest first, without lines that a full disk has truncated."""
    try:
        lines = (folder / "starts.jsonl").read_text().splitlines()
    except OSError:
        return []
    launches = []
    for line in lines:
        try:
            values = json.loads(line)
            launches.append(Launch(**{_OLD_FIELDS.get(key, key): value for key, value in values.items()}))
        except (ValueError, TypeError, AttributeError):
            continue
    return launches


def is_alive(launch: Launch) -> bool | None:
    """Whether rank 0 of a launch still runs; None if it ran on another machine."""
    if launch.host != socket.gethostname():
        return None
    try:
        return bool(abs(psutil.Process(launch.process).create_time() - launch.create_time) < 1)
    except psutil.NoSuchProcess:
        return False
