"""Checkpoints that are whole or absent.

    checkpoints/
        step-00000400/
            model.safetensors       parameters in fp32 and buffers, by name
            optimizer.safetensors   optimiser tensors, by parameter name
            state.json              step, seed, world size, version
        latest                      the name of the newest whole one

The learning rate, the data order, augmentation and dropout are pure functions of (seed, step), so a step number is
all that has to be stored of them.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dist_pca import __version__
from dist_pca.errors import UserError
from dist_pca.model.batch_norm import average_batch_norm
from dist_pca.training.zero import full_optimizer_state, full_parameters, load_optimizer_state


def save_checkpoint(engine: Any, folder: Path, step: int, *, seed: int, keep: int) -> None:
    """Write a checkpoint after `step` updates, then point `latest` at it and drop all but the newest `keep`.

    Collective; rank 0 writes. Batch-norm statistics are averaged over ranks first, and stay so.

    Raises:
        UserError: on rank 0, it cannot be written, most often for want of space; those before it are as they were.
    """
    average_batch_norm(engine.module)
    model = full_parameters(engine) | {name: b.detach().cpu().clone() for name, b in persistent_buffers(engine.module)}
    optimizer = full_optimizer_state(engine)
    if dist.get_rank() == 0:
        state = {"step": step, "seed": seed, "world_size": dist.get_world_size(), "version": __version__}
        _write(folder, f"step-{step:08d}", {"model": model, "optimizer": optimizer}, state)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            _remove(old)
    dist.barrier()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below a `checkpoints` folder, None where there is none."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    checkpoint = folder / pointer.read_text().strip()
    if not re.fullmatch(r"step-\d{8}", checkpoint.name) or not (checkpoint / "state.json").is_file():
        raise UserError(
            f"{pointer}: names {checkpoint.name!r}, which is not a checkpoint; write another step-* name into it"
        )
    return checkpoint


def read_step(checkpoint: Path) -> int:
    """Updates made before the checkpoint was written."""
    return int(json.loads((checkpoint / "state.json").read_text())["step"])


def load_model(model: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights and buffers into a model that DeepSpeed has not partitioned yet.

    Raises:
        UserError: the file is damaged or belongs to another network.
    """
    state = _load(checkpoint / "model.safetensors")
    expected = {name for name, _ in model.named_parameters()} | {name for name, _ in persistent_buffers(model)}
    if differing := sorted(expected ^ state.keys()):
        raise UserError(
            f"{checkpoint}: holds another network than model.* describes ({len(differing)} tensors differ, "
            f"first {differing[0]}); use the config it was trained with"
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: holds another network than model.* describes: {str(error).splitlines()[-1].strip()}"
        ) from None


def load_optimizer(engine: Any, checkpoint: Path) -> None:
    """Put a checkpoint's optimiser state into a prepared engine. Collective."""
    load_optimizer_state(engine, _load(checkpoint / "optimizer.safetensors"))


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers a state dict would hold."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); point checkpoints/latest at another step-*") from None


def _write(folder: Path, name: str, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, object]) -> None:
    aside, target = folder / f".{name}.partial", folder / name
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for part, values in tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in values.items()}, aside / f"{part}.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if target.exists():
            _remove(target)
        aside.rename(target)
        _write_whole(folder / "latest", name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        pointer = folder / "latest"
        before = pointer.read_text().strip() if pointer.is_file() else "no checkpoint"
        raise UserError(
            f"{target}: cannot be written ({error}); {before} is whole, so make room there and start the run again"
        ) from error


def _remove(checkpoint: Path) -> None:
    # Under a name of its own, so that no half-removed one is ever taken for a checkpoint.
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    _sync(aside)
    aside.replace(path)
    _sync(path.parent)
