"""Checkpoints, which are written atomically: finding them, and reading state and weights.

    checkpoints/
        step-00000400/
            model.safetensors       parameters in fp32 and buffers, by name
            ema.safetensors         parameters and buffers of the moving average, if training.ema_decay keeps one
            optimizer.safetensors   optimiser tensors, by parameter name
            statistics.safetensors  batch-norm statistics of each rank, where they differ
            state.json              step, world size, code, config, mIoU, loss scale
        latest                      name of the newest checkpoint
        best                        name of the one with the highest validation mIoU

No generator states are stored: learning rate, sample order, augmentation in every loader process and dropout on every
rank are pure functions of (seed, step). Batch-norm running statistics in model.safetensors and ema.safetensors are
their mean over ranks; a run that resumes on as many ranks restores each rank's own.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import dist_pca
from dist_pca.errors import UserError
from dist_pca.training.zero import persistent_buffers

Pointer = Literal["latest", "best"]
Weights = Literal["ema", "trained"]
_MAX_NAMES = 3
"""Number of tensors that a message names; the others are counted."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a `checkpoints` folder; None if there is none."""
    return pointed_at(folder, "latest")


def pointed_at(folder: Path, pointer: Pointer) -> Path | None:
    """The checkpoint that a pointer names; None if there is no such pointer.

    Raises:
        UserError: it names something that is not a checkpoint.
    """
    file = folder / pointer
    if not file.is_file():
        return None
    checkpoint = folder / file.read_text().strip()
    if not re.fullmatch(r"step-\d{8}", checkpoint.name) or not (checkpoint / "state.json").is_file():
        raise UserError(
            f"{file}: names {checkpoint.name!r}, which is not a checkpoint; write another step-* name into it"
        )
    return checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's `state.json`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot be read ({error}); point checkpoints/latest at another step-*") from None
    return state


def read_step(checkpoint: Path) -> int:
    """Number of steps trained before the checkpoint was written."""
    return int(read_state(checkpoint)["step"])


@cache
def code_version() -> str:
    """This package's version, with a hash of its source files, so that unreleased changes differ too."""
    digest = hashlib.sha256()
    package = Path(dist_pca.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{dist_pca.__version__}+{digest.hexdigest()[:12]}"


def load_model(model: torch.nn.Module, checkpoint: Path, *, ema: bool = False) -> None:
    """Load a checkpoint's weights and buffers into a model that DeepSpeed has not partitioned yet.

    Args:
        model: The model.
        checkpoint: The checkpoint.
        ema: The moving average rather than the trained weights.

    Raises:
        UserError: the file is missing or damaged, or belongs to another network; the message names what differs.
    """
    if ema and not has_ema(checkpoint):
        raise UserError(f"{checkpoint}: has no moving average (training.ema_decay was 0); use the trained weights")
    state = load_tensors(checkpoint / ("ema.safetensors" if ema else "model.safetensors"))
    own = dict(model.named_parameters()) | dict(persistent_buffers(model))
    shapes = [
        f"{name} {list(state[name].shape)} where the config has {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    differences = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "other shapes:": shapes,
    }
    if found := [f"{what} {abbreviate(names)}" for what, names in differences.items() if names]:
        raise UserError(
            f"{checkpoint}: belongs to another network than model.* and the classes describe: {'; '.join(found)}; "
            "use the config it was trained with"
        )
    model.load_state_dict(state, strict=False)


def has_ema(checkpoint: Path) -> bool:
    """Whether a checkpoint has a moving average of the weights."""
    return (checkpoint / "ema.safetensors").is_file()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a file of tensors by name.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); point checkpoints/latest at another step-*") from None


def abbreviate(names: Sequence[str]) -> str:
    """Join the first few names, and count the others."""
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
