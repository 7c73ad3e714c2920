"""The run folder: what a run writes there, whether another may continue it, and when it was launched."""

import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from pydantic import TypeAdapter

from dist_pca import __version__
from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.files import remove_parts, write_json
from dist_pca.training.checkpoint import (
    code_version,
    latest_checkpoint,
    read_state,
    read_step,
)

_CLASSES = TypeAdapter(tuple[ClassInfo, ...])
_log = logging.getLogger("dist_pca.training")
FREE_KEYS = (
    *("name", "output", "data.workers", "data.validation", "evaluation", "telemetry"),
    *("model.activation_checkpointing", "model.compile", "training.offload", "training.validate_every"),
    *(f"training.{key}" for key in ("zero_stage", "log_every", "checkpoint_every", "keep_checkpoints")),
    *(f"training.{key}" for key in ("time_limit", "stall_timeout", "max_bad_steps")),
)
"""Keys and sections that do not change what is computed, and may differ when a run is resumed."""
GRAD_CACHE_KEYS = ("training.accumulation", "training.max_micro_batch")
"""Further keys of this kind under GradCache, where all micro-batches of an update have one loss."""
_LAUNCH_KEYS = {"create_time": "born"}
"""Keys in the file by field, where they differ."""
_LAUNCH_FIELDS = {key: field for field, key in _LAUNCH_KEYS.items()}
PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "webdataset")


def create_run(config: RunConfig, classes: tuple[ClassInfo, ...], world_size: int, start_step: int) -> None:
    """Write the run folder: resolved config, class table and environment; log the launch after `start_step` steps."""
    config.folder.mkdir(parents=True, exist_ok=True)
    remove_parts(config.folder)
    save_config(config, config.folder / "config.yaml")
    write_json(config.folder / "classes.json", [asdict(info) for info in classes])
    environment = {
        "dist_pca": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": world_size,
        "command": sys.argv,
    }
    write_json(config.folder / "environment.json", environment)
    log_launch(config.folder, start_step, world_size, os.environ)


def read_run(folder: Path) -> tuple[RunConfig, tuple[ClassInfo, ...]]:
    """Read the config and class table of a run folder.

    Raises:
        UserError: the folder is not a run.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "classes.json").is_file():
        raise UserError(
            f"{folder}: not a run folder (no config.yaml or classes.json); name the folder that training wrote"
        )
    classes = _CLASSES.validate_json((folder / "classes.json").read_text())
    return load_config(folder / "config.yaml"), classes


def check_resume(config: RunConfig, resume: bool | None) -> None:
    """Check that a run may start in its folder.

    Args:
        config: The run.
        resume: None resumes the same run; True also one whose keys differ, and logs them; False accepts only a folder
            without a run.

    Raises:
        UserError: the folder holds a run of another config (every differing key is named), or any run if `resume` is
            False.
    """
    made = config.folder / "config.yaml"
    if not made.is_file():
        return
    if resume is False:
        raise UserError(f"{config.folder}: already holds a run; drop --no-resume to resume it, or choose another name=")
    differing = config_differences(load_config(made), config)
    if differing and not resume:
        raise UserError(
            f"{config.folder}: holds a run of another config ({'; '.join(differing)}); choose another name=, "
            "or add --resume to resume it with the changed keys"
        )
    for difference in differing:
        _log.info("resuming with %s", difference)
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    if checkpoint is not None and (before := read_state(checkpoint).get("code")) != code_version():
        _log.info("resuming with dist-pca %s; %s was saved by %s", code_version(), checkpoint.name, before)


def config_differences(made: RunConfig, wanted: RunConfig) -> list[str]:
    """List the keys that decide what is computed and differ between two runs, each as `key: made -> wanted`."""
    free = (*FREE_KEYS, *(GRAD_CACHE_KEYS if wanted.training.accumulation_pool == "update" else ()))
    return list(_differences(made.model_dump(mode="json"), wanted.model_dump(mode="json"), free))


def is_finished(config: RunConfig) -> bool:
    """Whether the run has a checkpoint of its last step."""
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    return checkpoint is not None and read_step(checkpoint) >= config.training.steps


def _differences(old: dict[str, Any], new: dict[str, Any], free: Sequence[str], prefix: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*old, *new)):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if before == after or key in free:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, free, f"{key}.")
        else:
            yield f"{key}: {before} -> {after}"


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
    """Unix time at which that process was created, since process ids are reused; `born` in the file."""
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
        values = {_LAUNCH_KEYS.get(name, name): value for name, value in launch._asdict().items()}
        lines.write(json.dumps(values) + "\n")


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
            launches.append(Launch(**{_LAUNCH_FIELDS.get(key, key): value for key, value in values.items()}))
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
