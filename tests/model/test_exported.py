import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.classes import CITYSCAPES_CLASSES
from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.exported import load_exported, save_exported
from dist_pca.model.segmenter import build_segmenter

NETWORKS: list[dict[str, Any]] = [
    {"backbone": "test_resnet", "head": "pyramid", "head_channels": 8, "output_stride": None},
    {"backbone": "test_resnet", "head": "deeplab_v2", "association_features": "head", "batch_norm": "sync"},
    {"backbone": "test_convnext", "head": "daformer", "head_channels": 8, "association_features": "projection"},
    {"backbone": "test_vit", "head": "mlp", "head_stride": 8, "output_stride": None, "association_stride": 32},
    {
        "backbone": "test_resnet",
        "head": "pyramid",
        "association_features": "projection",
        "association_stride": 16,
        "projection_channels": 12,
    },
    {"backbone": "test_resnet", "head": "pyramid", "head_channels": 8, "bands": 5},
]


def export(folder: Path, keys: dict[str, Any] = NETWORKS[0]) -> torch.nn.Module:
    config = ModelConfig.model_validate(keys | {"weights": "scratch"})
    model = build_segmenter(config, 19).eval()
    save_exported(folder, model, config, CITYSCAPES_CLASSES, input_size=(64, 96), shorter_edge=64)
    return model


@pytest.mark.parametrize("keys", NETWORKS)
def test_what_is_read_is_what_was_written(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = export(tmp_path, keys)
    found = load_exported(tmp_path)
    images = torch.randint(0, 256, (2, keys.get("bands", 3), 48, 64), dtype=torch.uint8)
    with torch.no_grad():
        read, written = found.model(images), model(images)
    assert torch.equal(read.logits, written.logits)
    assert torch.equal(read.features, written.features)
    assert not found.model.training
    assert found[1:] == (CITYSCAPES_CLASSES, (64, 96), 64)


def test_a_folder_of_the_first_version_is_read_as_the_network_of_stride_eight_that_it_is(tmp_path: Path) -> None:
    model = export(tmp_path, NETWORKS[0] | {"head_stride": 8})
    description = json.loads((tmp_path / "config.json").read_text()) | {"version": 1}
    for key in ("head_stride", "association_stride", "projection_channels", "image_size", "bands"):
        del description["network"][key]
    (tmp_path / "config.json").write_text(json.dumps(description))
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path).model(images).logits, model(images).logits)


def test_reading_needs_no_trainer(tmp_path: Path) -> None:
    export(tmp_path)
    blocked = (
        "deepspeed",
        "accelerate",
        "webdataset",
        "tensorboard",
        "pydantic",
        "omegaconf",
        "dist_pca.config",
        "dist_pca.training",
        "dist_pca.data",
    )
    program = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "from dist_pca.model.exported import load_exported\nprint(len(load_exported(sys.argv[1]).classes))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "19", done.stderr


def test_all_may_read_what_others_may_read(tmp_path: Path) -> None:
    export(tmp_path)
    (tmp_path / "any").write_text("x")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", "{", "config.json: cannot be read"),
        ("config.json", "[]", "not an exported network"),
        ("config.json", '{"format": "dist-pca-segmenter", "version": 3}', "format version 3, this dist-pca reads"),
        ("config.json", '{"format": "dist-pca-segmenter", "version": 1}', "damaged .KeyError: 'network'"),
        ("classes.json", '[{"name": "road", "color": [1, 2, 3]}]', "damaged .RuntimeError: Error.* in loading"),
        ("model.safetensors", "x", "damaged .SafetensorError"),
        ("model.safetensors", None, "has no model.safetensors"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    export(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_exported(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_says_what_a_reader_in_another_language_needs(tmp_path: Path) -> None:
    export(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["input_size"] == [64, 96]
    assert description["network"]["backbone"] == "test_resnet"
