"""Start a run from a whole trained segmenter: another run, one of its checkpoints, or an exported network."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dist_pca.classes import ClassInfo
from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter
from dist_pca.model.weights import load_state
from dist_pca.training.checkpoint import latest_checkpoint
from dist_pca.training.checkpoint_loading import has_ema, load_tensors
from dist_pca.training.run_folder import read_classes

_log = logging.getLogger("dist_pca.training")
_WEIGHTS = "model.safetensors"


def initialise(model: Segmenter, config: ModelConfig, classes: Sequence[ClassInfo]) -> None:
    """Set a network's weights to those of `model.init_from`, and log what starts anew.

    Args:
        model: The network, before DeepSpeed has partitioned it.
        config: What it was built from.
        classes: Classes of the run, by train id.

    Raises:
        UserError: there is no trained segmenter, it cannot be read, or it has another backbone.
    """
    assert config.init_from is not None
    file, run = _locate(Path(config.init_from))
    state, names = load_tensors(file), [info.name for info in read_classes(run)]
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    origin, bands = f"model.init_from: {file}", model.backbone.options.bands
    found, _ = load_state(model.backbone.body, config.backbone, backbone, origin, config.image_size, bands)
    for name in ("mean", "std"):
        # A network for RGB has no statistics of other bands.
        if state[name].shape == model.get_buffer(name).shape:
            model.get_buffer(name).copy_(state[name])
    anew = []
    if names != [info.name for info in classes]:
        anew.append(f"the head, as its {len(names)} classes are not those of this run")
    elif not _load_module(model.head, state, "head."):
        anew.append("the head, as model.head or its size is another one")
    if model.projection is not None and not _load_module(model.projection, state, "projection."):
        anew.append("the projection, as there is none of this size")
    started = "; new from the start: " + " and ".join(anew) if anew else ", and the head"
    _log.info("model.init_from: loaded %s from %s%s", found.account(config.backbone), file, started)


def _load_module(module: nn.Module, state: Mapping[str, torch.Tensor], prefix: str) -> bool:
    """Load all of a module's tensors if they are there and fit, and return whether they are."""
    own = module.state_dict()
    found = {key: state[prefix + key] for key in own if prefix + key in state}
    fits = len(found) == len(own) and all(found[key].shape == own[key].shape for key in own)
    if fits:
        module.load_state_dict(found)
    return fits


def _locate(path: Path) -> tuple[Path, Path]:
    """Find the file of a trained segmenter's weights, and the folder of its class table."""
    if path.name.endswith(".safetensors") and path.is_file():
        folder = path.parent
    elif (path / "checkpoints").is_dir():
        newest = latest_checkpoint(path / "checkpoints")
        if newest is None:
            raise UserError(f"model.init_from: {path} has no checkpoint yet; name a run that has one")
        folder = newest
    else:
        folder = path
    weights = path if path.is_file() else folder / ("ema.safetensors" if has_ema(folder) else _WEIGHTS)
    for table in (folder, folder.parent.parent):
        if weights.is_file() and (table / "classes.json").is_file():
            return weights, table
    raise UserError(
        f"model.init_from: {path} is no trained segmenter; give a run folder, its checkpoints/step-*, or a folder that "
        "`dist-pca export` wrote (weights of a backbone alone go into model.weights)"
    )
