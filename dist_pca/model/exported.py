"""A trained network as a folder of its own, which needs no run, no config and no trainer to be read.

model.safetensors   parameters and buffers, fp32
config.json         the network, and at which size images were shown to it
classes.json        names and colours by train id
"""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dist_pca.config import ModelConfig

FORMAT = "dist-pca-segmenter"
VERSION = 2
NETWORK_KEYS = (
    "backbone",
    "output_stride",
    "image_size",
    "bands",
    "head",
    "head_channels",
    "head_stride",
    "association_features",
    "association_stride",
    "projection_channels",
)
_NETWORK_OF_VERSION_1 = {"head_stride": 8, "association_stride": None, "projection_channels": 256}
"""What the keys that version 1 did not write were; plain transformers had no finer logits than their patches then, and
are refused as damaged where their head is a pyramid."""


class Exported(NamedTuple):
    """What an exported folder holds."""

    model: Segmenter
    """On the CPU, in evaluation mode: images B x bands x H x W, uint8 or 0..1, to logits B x K x h x w."""
    classes: tuple[ClassInfo, ...]
    """Classes by train id."""
    input_size: tuple[int, int] | None
    """Height and width that images were resized to; None if their proportions were kept."""
    shorter_edge: int
    """Shorter edge, in pixels, that images were resized to."""


def save_exported(
    folder: Path,
    model: Segmenter,
    config: "ModelConfig",
    classes: "Sequence[ClassInfo]",
    *,
    input_size: tuple[int, int] | None,
    shorter_edge: int,
) -> None:
    """Write a network into an existing folder.

    Args:
        folder: The folder.
        model: The network.
        config: What it was built from.
        classes: Classes by train id.
        input_size: As in `Exported`.
        shorter_edge: As in `Exported`.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # Not save_file, which creates files that other users cannot read.
    (folder / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "network": {key: getattr(config, key) for key in NETWORK_KEYS},
        "input_size": input_size,
        "shorter_edge": shorter_edge,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n")
    (folder / "classes.json").write_text(json.dumps([asdict(info) for info in classes], indent=1) + "\n")


def load_exported(folder: str | Path) -> Exported:
    """Read what `dist-pca export` wrote. Nothing in the folder is executed.

    Raises:
        UserError: the folder is not an export, was made by another version, or is damaged.
    """
    folder = Path(folder)
    description = _read_json(folder / "config.json")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: has no model.safetensors; export the run again")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{folder}: not an exported network; make one with `dist-pca export`")
    if description.get("version") not in (1, VERSION):
        raise UserError(
            f"{folder}: format version {description.get('version')!r}, this dist-pca reads versions up to {VERSION}; "
            "export the run again"
        )
    try:
        added = _NETWORK_OF_VERSION_1 if description["version"] == 1 else {}
        described = {"image_size": None, "bands": None} | added | description["network"]
        network = {key: described[key] for key in NETWORK_KEYS}
        network["image_size"] = network["image_size"] and tuple(network["image_size"])
        classes = tuple(ClassInfo(info["name"], tuple(info["color"])) for info in _read_json(folder / "classes.json"))
        size = description["input_size"]
        model = build_network(cast("ModelConfig", SimpleNamespace(**network)), len(classes))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return Exported(model.eval(), classes, size and tuple(size), description["shorter_edge"])
    except (KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}: damaged ({type(error).__name__}: {reason}); export the run again") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file; make the folder with `dist-pca export`")
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the run again") from error
