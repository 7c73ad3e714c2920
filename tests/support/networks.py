"""Small networks drawn from scratch, and runs that they belong to."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_pca.classes import ClassInfo
from dist_pca.config import ModelConfig, RunConfig, save_config
from dist_pca.model.segmenter import Segmenter, build_segmenter

CLASSES = tuple(ClassInfo(name, (60 * index, 200, 100)) for index, name in enumerate(("road", "sky", "car")))


def segmenter(classes: int = 3, **keys: Any) -> Segmenter:
    """A network in evaluation mode that predicts every class somewhere."""
    values = {"backbone": "test_resnet", "weights": "scratch", "head": "pyramid", "head_channels": 8} | keys
    torch.manual_seed(3)
    network = build_segmenter(ModelConfig.model_validate(values), classes)
    for layer in network.head.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == classes:
            torch.nn.init.normal_(layer.weight)
    return network.eval()


def run_config(output: str = "runs", model: dict[str, Any] | None = None, **evaluation: Any) -> RunConfig:
    """A run of that network."""
    network = {"backbone": "test_resnet", "weights": "scratch", "head": "pyramid", "head_channels": 8}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "output": output,
            "data": {"source": "s", "target": "t", "shorter_edge": (20, 28), "crop": (16, 16), "workers": 0},
            "model": network | (model or {}),
            "training": {"steps": 1},
            "evaluation": evaluation,
        }
    )


def write_run(
    folder: Path,
    *networks: Segmenter,
    classes: Sequence[ClassInfo] = CLASSES,
    model: dict[str, Any] | None = None,
    **evaluation: Any,
) -> Path:
    """A run folder that holds networks as its checkpoints of steps 1, 2, ..."""
    run = folder / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    save_config(run_config(str(folder), model, **evaluation), run / "config.yaml")
    (run / "classes.json").write_text(json.dumps([asdict(info) for info in classes]))
    for step, network in enumerate(networks, 1):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir()
        save_file(network.state_dict(), checkpoint / "model.safetensors")
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "world_size": 1, "code": "0"}))
        (run / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    return run
