"""A named pipe where a file is expected is refused, not waited for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_pca.config import load_config
from dist_pca.errors import UserError
from dist_pca.model.exported import load_exported
from dist_pca.model.weights import load_weights
from dist_pca.resilience.exit_status import read_exit_status
from dist_pca.shards.build import build_shards
from dist_pca.shards.images import open_image
from dist_pca.shards.index import index_shards
from dist_pca.shards.manifest import load_manifest
from dist_pca.shards.recipe import load_recipe
from dist_pca.training.run_folder import read_launch_log, read_run
from tests.support.raw_data import make_folder

READERS: dict[str, Callable[[Path], object]] = {
    "run.yaml": lambda folder: load_config(folder / "run.yaml"),
    "recipe.yaml": lambda folder: load_recipe(folder / "recipe.yaml"),
    "manifest.json": load_manifest,
    "config.json": load_exported,
    "config.yaml": read_run,
    "weights.pth": lambda folder: load_weights(torch.nn.Linear(1, 1), "test_resnet", str(folder / "weights.pth")),
    "images.tar": lambda folder: index_shards(folder, classes=None, workers=1),
    "raw/labels/001.png": lambda folder: build_shards("folder", folder / "raw", folder / "out", workers=1),
    "one.png": lambda folder: open_image(folder / "one.png"),
    "raw/classes.yaml": lambda folder: build_shards("folder", folder / "raw", folder / "out", workers=1),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "raw")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError) as refused:
        READERS[name](tmp_path)
    assert Path(name).stem.partition(".")[0] in str(refused.value)


@pytest.mark.timeout(60)
def test_pipes_in_place_of_logs_are_no_logs(tmp_path: Path) -> None:
    for name in ("exit.json", "starts.jsonl"):
        os.mkfifo(tmp_path / name)
    assert read_exit_status(tmp_path) is None
    assert read_launch_log(tmp_path) == []
