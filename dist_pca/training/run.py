"""A run folder: what a run was given, where it ran, what it made."""

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import TypeAdapter

from dist_pca import __version__
from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.shards.classes import ClassInfo
from dist_pca.training.checkpoint import latest_checkpoint, load_model

_CLASSES = TypeAdapter(tuple[ClassInfo, ...])
PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "webdataset")


def create_run(config: RunConfig, classes: tuple[ClassInfo, ...], world_size: int) -> None:
    """Make the run folder: resolved config, class table, environment."""
    config.folder.mkdir(parents=True, exist_ok=True)
    save_config(config, config.folder / "config.yaml")
    (config.folder / "classes.json").write_text(json.dumps([asdict(info) for info in classes], indent=1) + "\n")
    environment = {
        "dist_pca": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": world_size,
        "command": sys.argv,
    }
    (config.folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def load_run(folder: Path, checkpoint: str | None = None) -> tuple[RunConfig, tuple[ClassInfo, ...], Segmenter]:
    """Config, class table and network of a run, in evaluation mode on the CPU.

    Args:
        folder: The run folder.
        checkpoint: Step or name of a checkpoint; None takes the newest.

    Raises:
        UserError: the folder is not a run, or has no checkpoint or not this one.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "classes.json").is_file():
        raise UserError(
            f"{folder}: not a run folder (no config.yaml or classes.json); give the folder that training wrote"
        )
    config = load_config(folder / "config.yaml")
    classes = _CLASSES.validate_json((folder / "classes.json").read_text())
    weights = latest_checkpoint(folder / "checkpoints") if checkpoint is None else _checkpoint(folder, checkpoint)
    if weights is None:
        raise UserError(f"{folder}: has no checkpoint yet; train it first, or lower training.checkpoint_every")
    model = build_segmenter(config.model.model_copy(update={"weights": "scratch", "batch_norm": "local"}), len(classes))
    load_model(model, weights)
    return config, classes, model.eval()


def _checkpoint(folder: Path, wanted: str) -> Path:
    name = f"step-{int(wanted):08d}" if wanted.isdecimal() else wanted
    there = {path.name: path for path in sorted((folder / "checkpoints").glob("step-*"))}
    if name not in there:
        raise UserError(f"checkpoint {wanted}: not in {folder}, which has {', '.join(there) or 'none'}")
    return there[name]
