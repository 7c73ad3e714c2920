"""The run folder: config, classes and environment that a run writes, and the network that is loaded from it."""

import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import TypeAdapter

from dist_pca import __version__
from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.files import remove_parts, write_json
from dist_pca.model.segmenter import Segmenter, build_network
from dist_pca.training.checkpoint import Weights, has_ema, latest_checkpoint, load_model, pointed_at
from dist_pca.training.launch_log import log_launch

_CLASSES = TypeAdapter(tuple[ClassInfo, ...])
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


def load_run(
    folder: Path, checkpoint: str | None = None, *, weights: Weights | None = None
) -> tuple[RunConfig, tuple[ClassInfo, ...], Segmenter]:
    """Load a run's config, class table and network, which is in evaluation mode on the CPU.

    Args:
        folder: The run folder.
        checkpoint: Step or name of a checkpoint, or `best`; None loads the newest.
        weights: The moving average or the trained weights; None loads the average if the checkpoint has one.

    Raises:
        UserError: the folder is not a run, has no checkpoint or not this one, or no such weights.
    """
    config, classes = read_run(folder)
    chosen = find_checkpoint(folder, checkpoint)
    model = build_network(config.model, len(classes))
    load_model(model, chosen, ema=weights == "ema" or (weights is None and has_ema(chosen)))
    return config, classes, model.eval()


def find_checkpoint(folder: Path, wanted: str | None = None) -> Path:
    """Find a checkpoint of a run folder by its step, its name or `best`; None loads the newest.

    Raises:
        UserError: there is none, or not this one.
    """
    if wanted is None:
        if (newest := latest_checkpoint(folder / "checkpoints")) is not None:
            return newest
        raise UserError(f"{folder}: has no checkpoint yet; train it first, or lower training.checkpoint_every")
    if wanted == "best" and (best := pointed_at(folder / "checkpoints", "best")) is not None:
        return best
    name = f"step-{int(wanted):08d}" if wanted.isdecimal() else wanted
    there = {path.name: path for path in sorted((folder / "checkpoints").glob("step-*"))}
    if name not in there:
        raise UserError(f"checkpoint {wanted}: not in {folder}, which has {', '.join(there) or 'none'}")
    return there[name]
