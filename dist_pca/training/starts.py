"""Where and from which step a run was started, each time: `starts.jsonl` in the run folder."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]


class Start(NamedTuple):
    """One line of `starts.jsonl`."""

    time: float
    """Unix time."""
    step: int
    """Steps that were made before."""
    world_size: int
    host: str
    """Of rank 0."""
    process: int
    """Of rank 0."""
    born: float
    """When that process began, in Unix time: numbers of processes come round again."""
    job: str | None = None
    """SLURM's, if any."""
    restart: int = 0
    """How often SLURM had started the job again by then."""


def record_start(folder: Path, step: int, world_size: int, environment: Mapping[str, str]) -> None:
    """Add a line to `starts.jsonl`; only rank 0 does."""
    process = psutil.Process()
    start = Start(
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
        lines.write(json.dumps(start._asdict()) + "\n")


def read_starts(folder: Path) -> list[Start]:
    """All starts of a run, the oldest first; a line that a full disk cut short is left out."""
    try:
        lines = (folder / "starts.jsonl").read_text().splitlines()
    except OSError:
        return []
    starts = []
    for line in lines:
        try:
            starts.append(Start(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return starts


def is_alive(start: Start) -> bool | None:
    """Whether rank 0 of a start still runs; None where another machine would know."""
    if start.host != socket.gethostname():
        return None
    try:
        return bool(abs(psutil.Process(start.process).create_time() - start.born) < 1)
    except psutil.NoSuchProcess:
        return False
