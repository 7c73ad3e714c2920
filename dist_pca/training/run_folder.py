"""The run folder: what a run writes there, whether another may continue it, and when it was launched."""

import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from dist_pca import __version__
from dist_pca.classes import ClassInfo, check_classes
from dist_pca.config import RunConfig, load_config, save_config, validate_config
from dist_pca.errors import UserError
from dist_pca.files import last_step, read_lines, read_record, remove_parts, write_json, write_record
from dist_pca.shards.manifest import Manifest, shards_digest
from dist_pca.training.accumulation import fit_batches
from dist_pca.training.checkpoint import (
    code_version,
    latest_checkpoint,
    read_state,
    read_step,
    set_aside_after,
)
from dist_pca.training.optimizer import learning_rate_factor

_CLASSES = TypeAdapter(tuple[ClassInfo, ...])
_log = logging.getLogger("dist_pca.training")
FREE_KEYS = (
    *("name", "output", "data.workers", "data.cache", "data.validation", "evaluation", "telemetry"),
    *("model.activation_checkpointing", "model.compile", "training.offload", "training.validate_every"),
    *(f"training.{key}" for key in ("zero_stage", "log_every", "checkpoint_every", "keep_checkpoints")),
    *(f"training.{key}" for key in ("time_limit", "stall_timeout", "max_non_finite_steps")),
)
"""Keys and sections that do not change what is computed, and may differ when a run is resumed."""
GRAD_CACHE_KEYS = ("training.accumulation", "training.max_micro_batch")
"""Further keys of this kind under GradCache, where all micro-batches of an update have one loss."""
FILES = (
    *("config.yaml", "classes.json", "data.json", "environment.json", "exit.json", "lock.json"),
    *("metrics.jsonl", "samples.jsonl", "starts.jsonl", "checkpoints/latest", "checkpoints/best"),
)
"""Files that a run writes into its folder, beside its checkpoints."""
_NOTABLE_CHANGE = 0.001
"""Change of the learning rate, relative to what it was, that is worth a word where a run resumes."""
_REWRITTEN = {
    "classes.json": "classes are not compared with those the run was trained on; writing it again",
    "data.json": "shards are not compared with those the run was trained on; writing it again",
    "metrics.jsonl": "earlier steps are lost to it; writing on from here",
}
"""Files that a resumed run can do without, and what their loss means."""
_OLD_LAUNCH_FIELDS = {"born": "create_time"}
"""New field by the one that version 0.1 wrote."""
PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "webdataset")


class ShardsRecord(TypedDict):
    """The shards of one folder that a run is trained on."""

    folder: str
    samples: int
    sha256: str
    """Digest of the shards' names and contents."""


_DATA = TypeAdapter(dict[str, list[ShardsRecord]])


class RunData(NamedTuple):
    """What a run is trained on."""

    classes: tuple[ClassInfo, ...]
    sources: tuple[Manifest, ...]
    targets: tuple[Manifest, ...]
    """Empty where the run does not adapt."""

    def record(self) -> dict[str, list["ShardsRecord"]]:
        """Content of `data.json`, by domain."""
        return {
            domain: [
                {"folder": str(manifest.location), "samples": manifest.samples, "sha256": shards_digest(manifest)}
                for manifest in manifests
            ]
            for domain, manifests in (("source", self.sources), ("target", self.targets))
        }


def create_run(config: RunConfig, data: RunData, world_size: int, start_step: int) -> None:
    """Write the run folder: resolved config, classes, shards, environment; log the launch after `start_step` steps.

    Checkpoints of later steps are set aside.

    Raises:
        OSError: a file cannot be written.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    remove_parts(config.folder)
    save_config(config, config.folder / "config.yaml")
    write_json(config.folder / "classes.json", [asdict(info) for info in data.classes])
    write_record(config.folder / "data.json", data.record())
    environment = {
        "dist_pca": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": world_size,
        "command": sys.argv,
    }
    write_record(config.folder / "environment.json", environment)
    for checkpoint in set_aside_after(config.folder / "checkpoints", start_step):
        _log.warning("resuming after step %d; a later checkpoint is now %s", start_step, checkpoint)
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
    return load_config(folder / "config.yaml"), read_classes(folder)


def read_classes(folder: Path) -> tuple[ClassInfo, ...]:
    """Read the class table of a run folder.

    Raises:
        UserError: it is damaged.
    """
    file = folder / "classes.json"
    try:
        classes = _CLASSES.validate_json(file.read_bytes())
        check_classes(classes)
        return classes
    except (OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{file}: cannot be read ({reason}); remove it to have it written again by training") from None


def check_resume(config: RunConfig, resume: bool | None, data: RunData | None = None) -> None:
    """Check that a run may start in its folder.

    Args:
        config: The run, with its batches over all ranks set (`fit_batches`).
        resume: None resumes the same run; True also one whose keys or shards differ, and logs them; False accepts only
            a folder without a run.
        data: What it is to be trained on; None skips the comparison of classes and shards.

    Raises:
        UserError: the folder holds a run of another config or other shards (every difference is named), any run if
            `resume` is False, a run with other classes, or one whose checkpoints are missing.
    """
    folder = config.folder
    for name in FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name}: not a file, which a run needs there; move it away")
    for path in (folder, folder / "checkpoints", *(folder / name for name in FILES)):
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written; make it writable, or choose another name=")
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if (folder / "config.yaml").is_file():
        made = load_config(folder / "config.yaml")
    elif checkpoint is not None:
        _log.info("%s: has no config.yaml; comparing with that of %s", folder, checkpoint.name)
        made = validate_config(read_state(checkpoint).get("config"), str(checkpoint / "state.json"))
    else:
        return
    if resume is False:
        raise UserError(f"{folder}: already holds a run; drop --no-resume to resume it, or choose another name=")
    differing = config_differences(made, config)
    if data is not None:
        _check_classes(folder, data.classes)
        differing += _shard_differences(folder, data)
    if differing and checkpoint is not None:
        state = read_state(checkpoint)
        # Batches that are given per rank scale the rate by those of all ranks that trained.
        trained = fit_batches(made, state.get("world_size", 1))
        differing += _rate_change(trained, config, state["step"])
    if differing and not resume:
        raise UserError(
            f"{folder}: holds a run of another config or other data ({'; '.join(differing)}); choose another name=, "
            "or add --resume to resume it with these changes"
        )
    for difference in differing:
        _log.info("resuming with %s", difference)
    if checkpoint is None:
        _check_nothing_is_lost(folder, made)
        return
    if not (checkpoint.parent / "latest").is_file():
        _log.info("%s/latest is missing; resuming from %s, the newest", checkpoint.parent, checkpoint.name)
    for name, consequence in _REWRITTEN.items():
        if not (folder / name).is_file():
            _log.info("%s is missing: %s", folder / name, consequence)
    state = read_state(checkpoint)
    if (before := state.get("code")) != code_version():
        _log.info("resuming with dist-pca %s; %s was saved by %s", code_version(), checkpoint.name, before)
    if "config" in state:
        saved = validate_config(state["config"], str(checkpoint / "state.json"))
        if unlike := config_differences(saved, made):
            # After a start with --resume too, whose keys are those of config.yaml.
            _log.info("%s was saved by a run of another config (%s)", checkpoint.name, "; ".join(unlike))


def _check_classes(folder: Path, classes: Sequence[ClassInfo]) -> None:
    if not (folder / "classes.json").is_file():
        return
    for index, (before, now) in enumerate(zip_longest(read_classes(folder), classes)):
        if before is None or now is None or before.name != now.name:
            names = [info.name[:80] if info else "no class" for info in (before, now)]
            raise UserError(
                f"{folder}: was trained on other classes, first at train id {index}: {names[0]} there, {names[1]} in "
                "the shards; set data.classes to the run's, or choose another name="
            )


def _shard_differences(folder: Path, data: RunData) -> list[str]:
    """List the differences between the shards that the run was trained on and those that are there now."""
    if not (folder / "data.json").is_file():
        # Versions before 0.2 did not write it.
        return []
    remedy = "restore it, or remove it to resume without comparing the shards"
    record = read_record(folder / "data.json", _DATA, remedy)
    differences = []
    for domain, now in data.record().items():
        for before, after in zip(record.get(domain, []), now, strict=False):
            if before["sha256"] != after["sha256"]:
                differences.append(
                    f"data.{domain}: other shards, {before['samples']} samples in {before['folder']} -> "
                    f"{after['samples']} in {after['folder']}"
                )
    return differences


def _check_nothing_is_lost(folder: Path, made: RunConfig) -> None:
    """Check that a run without a checkpoint has not logged so many steps that it must have had one."""
    last = last_step(folder / "metrics.jsonl")
    # While the first checkpoint is written, training continues up to the second.
    if last > 2 * made.training.checkpoint_every:
        raise UserError(
            f"{folder}: has logged step {last}, but has no checkpoint; put checkpoints/ back, or choose another name= "
            "(to train it again from the start, remove metrics.jsonl)"
        )


def config_differences(made: RunConfig, wanted: RunConfig) -> list[str]:
    """List the keys that decide what is computed and differ between two runs, each as `key: made -> wanted`."""
    free = (*FREE_KEYS, *(GRAD_CACHE_KEYS if wanted.training.grad_cache else ()))
    for name in ("image_size", "bands"):
        if None in (getattr(made.model, name), getattr(wanted.model, name)):
            # Derived from backbone, crop and shards, which are compared themselves.
            free += (f"model.{name}",)
    return list(_differences(made.model_dump(mode="json"), wanted.model_dump(mode="json"), free))


def _rate_change(made: RunConfig, wanted: RunConfig, step: int) -> list[str]:
    """Say how the learning rate changes where a run resumes after `step` steps; nothing if it follows its schedule."""
    if step < made.training.steps:
        before = made.optimizer.lr * learning_rate_factor(made, step)
    else:
        before = made.optimizer.lr * learning_rate_factor(made, made.training.steps - 1)
    after = wanted.optimizer.lr * learning_rate_factor(wanted, step)
    if abs(after - before) <= _NOTABLE_CHANGE * before:
        return []
    keep = ""
    decays = wanted.schedule.name != "constant"
    if decays and wanted.training.steps != made.training.steps and wanted.schedule.horizon is None:
        keep = f" (schedule.horizon={made.training.steps} and a schedule.minimum keep it low)"
    return [f"the learning rate after step {step}: {before:.3g} -> {after:.3g}{keep}"]


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
    """Unix time at which that process was created, since process ids are reused."""
    job: str | None = None
    """SLURM's job id, if any."""
    restart: int = 0
    """Number of times SLURM had requeued the job."""


_LAUNCH = TypeAdapter(Launch)


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
    launches = []
    for _, values in read_lines(folder / "starts.jsonl"):
        with suppress(ValidationError):
            renamed = {_OLD_LAUNCH_FIELDS.get(key, key): value for key, value in values.items()}
            launches.append(_LAUNCH.validate_python(renamed))
    return launches
