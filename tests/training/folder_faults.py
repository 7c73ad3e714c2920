"""Spoil one file of a run folder in every way, start the run again each time, and print what became of it as JSON.

    python -m tests.training.folder_faults FOLDER [FILE]

Without a file, make the runs in the folder that the others need.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dist_pca import train
from tests.support.runs import build_streets, overrides

FILES = (
    *("checkpoints", "checkpoints/latest", "checkpoints/step-00000006"),
    *(f"checkpoints/step-00000006/{name}" for name in ("ema.safetensors", "model.safetensors")),
    *("checkpoints/step-00000006/optimizer.safetensors", "checkpoints/step-00000006/state.json"),
    *("checkpoints/step-00000004/state.json", "classes.json", "config.yaml", "data.json", "environment.json"),
    *("exit.json", "lock.json", "metrics.jsonl", "samples.jsonl", "starts.jsonl", "tensorboard"),
)
SETTINGS = (
    *("data.workers=0", "training.keep_checkpoints=10", "training.checkpoint_every=2", "training.ema_decay=0.9"),
    *("telemetry.sample_keys=true", "telemetry.trackers=[tensorboard]"),
)
SECONDS = 60
"""Time after which a start counts as one that hangs."""


def start(folder: Path, name: str, *settings: str) -> tuple[int | None, str]:
    """Train in a child process of this one, which has imported everything; returns its exit code and its output."""
    log = folder / f"{name}.log"
    child = os.fork()
    if child == 0:
        try:
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            train.main("demo", overrides(folder, name, *SETTINGS, *settings))
        except SystemExit as leaving:
            sys.stderr.flush()
            os._exit(int(leaving.code or 0))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), log.read_text()
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None, log.read_text()


def prepare(folder: Path) -> None:
    """Make a run of six steps that is to have eight, what it was after four, and another run."""
    build_streets(folder)
    for name, settings in (("case", ()), ("other", ("optimizer.lr=2e-3",))):
        assert start(folder, name, "training.steps=4", *settings)[0] == 0
    shutil.copytree(folder / "runs" / "case", folder / "older")
    edit(folder / "runs" / "case", 4, 6)
    assert start(folder, "case", "training.steps=6")[0] == 0
    edit(folder / "runs" / "case", 6, 8)
    shutil.move(folder / "runs" / "case", folder / "whole")


def edit(run: Path, before: int, after: int) -> None:
    """Give a run another number of steps, as if it had been stopped early."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"\n  steps: {before}\n", f"\n  steps: {after}\n"))
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(state.read_text().replace(f'"steps": {before}', f'"steps": {after}'))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def replace(path: Path, other: Path) -> None:
    remove(path)
    if other.is_dir():
        shutil.copytree(other, path)
    elif other.is_file():
        shutil.copy(other, path)


def empty(path: Path) -> None:
    was_folder = path.is_dir()
    remove(path)
    path.mkdir() if was_folder else path.touch()


def exchange_kind(path: Path) -> None:
    """Put a file where a folder was, and a folder where a file was."""
    was_folder = path.is_dir()
    remove(path)
    path.touch() if was_folder else path.mkdir()


def make_pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def truncate(path: Path) -> None:
    if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_read_only(path: Path) -> None:
    """Take away the right to write; root, who may write anyway, makes the file immutable where the disk can."""
    if not path.exists():
        return
    if os.geteuid():
        path.chmod(path.stat().st_mode & ~0o222)
    else:
        subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True)


def make_writable(path: Path) -> None:
    if os.geteuid():
        path.chmod(path.stat().st_mode | 0o200)
    else:
        subprocess.run(["chattr", "-i", str(path)], check=False, capture_output=True)


def faults(folder: Path, file: str) -> dict[str, Callable[[Path], None]]:
    """What is done to a file or folder, by name."""
    of_other = folder / "runs" / "other" / file.replace("step-00000006", "step-00000004")
    return {
        "removed": remove,
        "truncated": truncate,
        "emptied": empty,
        "of another kind": exchange_kind,
        "a pipe": make_pipe,
        "older": partial(replace, other=folder / "older" / file),
        "another run's": partial(replace, other=of_other),
        "read-only": make_read_only,
    }


def models(run: Path) -> set[str]:
    """Hashes of the weights of all checkpoints, wherever they are now."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("model.safetensors") if path.is_file()}


def contents(run: Path) -> dict[str, str]:
    """Hash of each file but `exit.json`, which says how a run ended."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and path.name != "exit.json"
    }


def outcomes(folder: Path, file: str) -> list[dict[str, Any]]:
    """What became of the run after each fault."""
    run, found = folder / "runs" / "case", []
    for name, spoil in faults(folder, file).items():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder / "whole", run)
        if file == "lock.json":
            gone = {"host": "elsewhere", "processes": "", "pid": 1, "started": 0.0}
            (run / file).write_text(json.dumps(gone))
            os.utime(run / file, (0, 0))
        spoil(run / file)
        there, before = models(run), contents(run)
        code, output = start(folder, "case", "training.steps=8")
        if (run / file).exists():
            make_writable(run / file)
        found.append(
            {
                "fault": name,
                "code": code,
                "errors": [line for line in output.splitlines() if line.startswith("error:")],
                "output": output,
                "lost": len(there - models(run)),
                "touched": sorted(key for key, value in contents(run).items() if before.get(key) != value),
            }
        )
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2:
        prepare(Path(sys.argv[1]))
    else:
        print(json.dumps(outcomes(Path(sys.argv[1]), sys.argv[2])))
