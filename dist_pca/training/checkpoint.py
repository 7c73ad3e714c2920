"""Checkpoints: finding, reading and writing them.

    checkpoints/
        step-00000400/
            model.safetensors       parameters in fp32 and buffers, by name
            ema.safetensors         parameters and buffers of the moving average, if training.ema_decay keeps one
            optimizer.safetensors   optimiser tensors, by parameter name
            statistics.safetensors  batch-norm statistics of each rank, where they differ
            classes.safetensors     class statistics, if objective.class_statistics keeps any
            state.json              step, world size, code, config, mIoU, loss scale, names of the other files
        latest                      name of the checkpoint that the run resumes from
        best                        name of the one with the highest validation mIoU
        set-aside/                  checkpoints of steps that are trained again, as `latest` named an older one

Only folders that were written whole count; whatever else is in `checkpoints/` is left alone.

No generator states are stored: learning rate, sample order, augmentation in every loader process and dropout on every
rank are pure functions of (seed, step). Batch-norm running statistics in model.safetensors and ema.safetensors are
their mean over ranks; a run that resumes on as many ranks restores each rank's own.

A checkpoint is copied to rank 0's memory at once, and written to disk by a thread, whole or not at all.
"""

import hashlib
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save_file
from typing_extensions import Required, Self, TypedDict

import dist_pca
from dist_pca.config import RunConfig
from dist_pca.distributed import raise_on_all_ranks
from dist_pca.errors import UserError
from dist_pca.files import read_record, remove_folder, sync, write_record, write_whole

Pointer = Literal["latest", "best"]
Weights = Literal["ema", "trained"]
Tensors = dict[str, torch.Tensor]
_MAX_NAMES = 3
"""Number of tensors that a message names; the others are counted."""


class CheckpointPart(Protocol):
    """State that a checkpoint holds in a file of its own."""

    file: str
    """Name of the file, without .safetensors."""
    optional: bool
    """Without tensors there is no file."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors to save by name, one at a time. Collective; all ranks must exhaust it."""

    def restore(self, checkpoint: Path) -> None:
        """Set the state to that of a checkpoint. Collective.

        Raises:
            UserError: the file is missing or damaged, or another network or optimiser wrote it.
        """


def whole_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a `checkpoints` folder that were written whole, oldest first."""
    return [path for path in sorted(folder.glob("step-*")) if _is_whole(path)]


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint from which a run resumes: the one that `latest` names, or else the newest that can be read.

    Returns:
        The checkpoint; None if there is none.

    Raises:
        UserError: `latest` names no checkpoint, or none of those that are there can be read.
    """
    named = pointed_at(folder, "latest")
    there = whole_checkpoints(folder)
    if named is not None or not there:
        return named
    for checkpoint in reversed(there):
        with suppress(UserError):
            read_state(checkpoint)
            return checkpoint
    raise UserError(f"{folder}: none of {abbreviate([path.name for path in there])} can be read; choose another name=")


def pointed_at(folder: Path, pointer: Pointer) -> Path | None:
    """The checkpoint that a pointer names; None if there is no such pointer.

    Raises:
        UserError: it names something that is not a checkpoint.
    """
    file = folder / pointer
    if not file.is_file():
        return None
    name = file.read_text(encoding="utf-8", errors="replace").strip()
    if not _is_name(name) or not _is_whole(folder / name):
        raise UserError(
            f"{file}: names {name[:40]!r}, which is not a checkpoint; write another step-* name into it, or "
            "remove it to resume from the newest"
        )
    return folder / name


class State(TypedDict, total=False):
    """What a checkpoint's `state.json` holds beside its format's version."""

    step: Required[Annotated[int, Field(ge=0)]]
    """Number of steps trained before."""
    world_size: int
    code: str
    """`code_version` of the package that wrote it."""
    config: dict[str, Any]
    mean_iou: float | None
    """The validation's at this step, in 0..1, if there was one."""
    id: str
    """Digest of all the rest, which the checkpoint's other files carry too."""
    files: list[str]
    """Names of these files."""
    samples: dict[str, Annotated[int, Field(ge=0)]]
    """Samples drawn before, by the config key of their batch."""
    windows: list[dict[str, tuple[float, float]]]
    """Sum and count of every metric since its last line, of each rank."""
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    loss_scale_steps: int
    non_finite_steps: Annotated[int, Field(ge=0)]
    """Number of steps in a row, up to this one, that were not finite; left out where it is 0."""


_STATE = TypeAdapter(State)


def read_state(checkpoint: Path) -> State:
    """Read a checkpoint's `state.json`.

    Raises:
        UserError: it cannot be read.
    """
    return read_record(checkpoint / "state.json", _STATE, "point checkpoints/latest at another step-*")


def read_step(checkpoint: Path) -> int:
    """Number of steps trained before the checkpoint was written."""
    return read_state(checkpoint)["step"]


@cache
def code_version() -> str:
    """This package's version, with a hash of its source files, so that unreleased changes differ too."""
    digest = hashlib.sha256()
    package = Path(dist_pca.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{dist_pca.__version__}+{digest.hexdigest()[:12]}"


def abbreviate(names: Sequence[str]) -> str:
    """Join the first few names, and count the others."""
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Move checkpoints of later steps into `set-aside`, so that those which are trained again do not mix with them.

    Also removes what a killed process has left half-written, and sets `best` anew.

    Args:
        folder: The `checkpoints` folder, in which no other process writes.
        step: Steps trained before the run resumes.

    Returns:
        Where they are now.
    """
    for unfinished in folder.glob(".step-*"):
        if re.fullmatch(r"\.step-\d{8}\.(partial|removed)", unfinished.name):
            shutil.rmtree(unfinished, ignore_errors=True)
    moved = [_set_aside(path) for path in whole_checkpoints(folder) if int(path.name.removeprefix("step-")) > step]
    if moved and (folder / "best").is_file():
        _point_to_best(folder)
    return moved


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; leaving its context waits for the last."""

    def __init__(self, folder: Path, config: RunConfig, *, device: torch.device) -> None:
        """Prepare to write checkpoints.

        Args:
            folder: The `checkpoints` folder.
            config: The run, for state.json and the number of checkpoints to keep.
            device: Device of tensors in collectives.
        """
        self._folder, self._device = folder, device
        self._keep, self._config = config.training.keep_checkpoints, config.model_dump(mode="json")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._in_flight = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join()

    def save(self, parts: Sequence[CheckpointPart], step: int, *, state: Mapping[str, object] | None = None) -> float:
        """Start writing a checkpoint after `step` updates, once the previous one is written. Collective.

        When it is complete, `latest` is set to it and `best` to the one of highest `mean_iou`, and all but the newest
        and the best are removed. Until then rank 0 keeps a copy of all tensors in memory.

        Args:
            parts: What to save, in files of its own.
            step: Number of updates.
            state: Further values for state.json.

        Returns:
            Seconds that this call took, for the previous checkpoint and for the copy.

        Raises:
            UserError: on every rank, the previous checkpoint could not be written.
        """
        began = time.perf_counter()
        self.finish()
        tensors = _snapshot(parts)
        if dist.get_rank() == 0:
            values = {
                "step": step,
                "world_size": dist.get_world_size(),
                "code": code_version(),
                "config": self._config,
                **(state or {}),
            }
            self._thread = threading.Thread(target=self._write, args=(f"step-{step:08d}", tensors, values), daemon=True)
            self._thread.start()
        self._in_flight = True
        return time.perf_counter() - began

    def poll(self) -> None:
        """Check for a failure of the checkpoint that is being written. Collective, to be called every step.

        Raises:
            UserError: on every rank, it could not be written, mostly as the disk is full; earlier checkpoints are
                intact.
        """
        if not self._in_flight:
            return
        done = torch.tensor(self._thread is None or not self._thread.is_alive(), device=self._device, dtype=torch.uint8)
        dist.broadcast(done, src=0)
        if done:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Collective.

        Raises:
            UserError: on all ranks, it cannot be written.
        """
        if not self._in_flight:
            return
        self._in_flight = False
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, UserError):
            raise error
        raise_on_all_ranks(None if error is None else str(error))

    def _write(self, name: str, tensors: dict[str, Tensors], state: dict[str, object]) -> None:
        try:
            _write_checkpoint(self._folder, name, tensors, state)
            there = whole_checkpoints(self._folder)
            kept = {name, _best(self._folder), *(path.name for path in there[-self._keep :])}
            for old in there:
                if old.name not in kept:
                    remove_folder(old)
        except Exception as error:  # Raised by the next `poll` or `save`, on all ranks.
            self._error = error


def _snapshot(parts: Sequence[CheckpointPart]) -> dict[str, Tensors]:
    """Copy the tensors of every file to rank 0's CPU memory; empty on other ranks. Collective."""
    is_rank0 = dist.get_rank() == 0
    files: dict[str, Tensors] = {}
    for part in parts:
        tensors: Tensors = {}
        for name, value in part.tensors():
            if is_rank0:
                tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        if tensors or not part.optional:
            files[part.file] = tensors
    return files


def _write_checkpoint(folder: Path, name: str, tensors: dict[str, Tensors], state: dict[str, object]) -> None:
    partial, target = folder / f".{name}.partial", folder / name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = [f"{part}.safetensors" for part in tensors]
        digest = hashlib.sha256(json.dumps([state, files]).encode()).hexdigest()
        for file, values in zip(files, tensors.values(), strict=True):
            save_file(values, partial / file, metadata={"checkpoint": digest})
        write_record(partial / "state.json", {**state, "id": digest, "files": files})
        for path in (*partial.iterdir(), partial):
            sync(path)
        if target.exists():
            _set_aside(target)
        partial.rename(target)
        write_whole(folder / "latest", name + "\n")
        _point_to_best(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        before = pointed_at(folder, "latest")
        raise UserError(
            f"{target}: cannot be written ({error}); {before.name if before else 'no checkpoint'} is intact, so make "
            "room there and start the run again"
        ) from error


def _best(folder: Path) -> str | None:
    """Name of the checkpoint of highest validation mIoU, the earliest of equals; None if none has been validated."""
    scores = {}
    for path in whole_checkpoints(folder):
        with suppress(UserError):
            scores[path.name] = read_state(path).get("mean_iou")
    known = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    return max(known, key=lambda name: known[name], default=None)


def _point_to_best(folder: Path) -> None:
    best = _best(folder)
    if best is None:
        (folder / "best").unlink(missing_ok=True)
    else:
        write_whole(folder / "best", best + "\n")


def _is_whole(path: Path) -> bool:
    return _is_name(path.name) and (path / "state.json").is_file()


def _is_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{8}", name) is not None


def _set_aside(path: Path) -> Path:
    """Move a file or folder of `checkpoints` into `set-aside`, under its own name or the next free one."""
    folder = path.parent / "set-aside"
    folder.mkdir(exist_ok=True)
    names = (path.name, *(f"{path.name}.{number}" for number in range(2, 10**6)))
    free = next(folder / name for name in names if not (folder / name).exists())
    return path.rename(free)
