"""Asynchronous checkpoints: copied to rank 0's memory at once, and written to disk by a thread."""

import math
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from typing_extensions import Self

from dist_pca.config import RunConfig
from dist_pca.distributed import raise_on_all_ranks
from dist_pca.errors import UserError
from dist_pca.files import remove_folder, sync, write_json, write_whole
from dist_pca.training.checkpoint import code_version, pointed_at, read_state
from dist_pca.training.checkpoint_parts import CheckpointPart

Tensors = dict[str, torch.Tensor]


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
            self._finish()
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
        self._finish()
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
            self._finish()

    def _finish(self) -> None:
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
            kept = {path.name for path in sorted(self._folder.glob("step-*"))[-self._keep :]} | {_best(self._folder)}
            for old in self._folder.glob("step-*"):
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
        for part, values in tensors.items():
            save_file(values, partial / f"{part}.safetensors")
        write_json(partial / "state.json", state)
        for path in (*partial.iterdir(), partial):
            sync(path)
        if target.exists():
            remove_folder(target)
        partial.rename(target)
        write_whole(folder / "latest", name + "\n")
        if (best := _best(folder)) is not None:
            write_whole(folder / "best", best + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        before = pointed_at(folder, "latest")
        raise UserError(
            f"{target}: cannot be written ({error}); {before.name if before else 'no checkpoint'} is intact, so make "
            "room there and start the run again"
        ) from error


def _best(folder: Path) -> str | None:
    """Name of the checkpoint of highest validation mIoU, the earliest of equals; None if none has been validated."""
    scores = {path.name: read_state(path).get("mean_iou") for path in sorted(folder.glob("step-*"))}
    known = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    return max(known, key=lambda name: known[name], default=None)
