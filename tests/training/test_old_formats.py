"""What version 0.1.0 wrote is read, scored and trained further; tests/fixtures/README.md says how it was made."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dist_pca.cli import main
from dist_pca.config import load_config
from dist_pca.config.aliases import KEY_ALIASES, METRIC_ALIASES, rename_metrics
from dist_pca.evaluation.load import load_run
from dist_pca.shards.manifest import load_manifest
from dist_pca.shards.sample import read_sample
from dist_pca.shards.verify import verify
from dist_pca.tools.cluster.status import read_status
from dist_pca.training.checkpoint import Weights
from dist_pca.training.run_folder import config_differences, log_launch, read_launch_log

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINT = Path("runs/old/checkpoints/step-00000003")
TERMS = (
    *("loss", "ce", "lovasz", "smoothness_target", "association_features", "association_predictions"),
    *("mutual_information_bound_features", "communication_bytes_features"),
)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the old run and shards, which name each other from there."""
    with tarfile.open(FIXTURES / "version_0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/old/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("weights", "file"), [(None, "ema.safetensors"), ("ema", "ema.safetensors"), ("trained", "model.safetensors")]
)
def test_an_old_runs_network_has_exactly_the_stored_tensors(old: Path, weights: Weights | None, file: str) -> None:
    config, classes, network = load_run(old / "runs/old", weights=weights)
    assert [info.name for info in classes] == ["road", "sky", "car"]
    assert config.model.backbone == "test_efficientnet"
    stored, loaded = load_file(CHECKPOINT / file), network.state_dict()
    assert loaded.keys() == stored.keys() | {name for name in loaded if name.endswith("num_batches_tracked")}
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())


@pytest.mark.usefixtures("old")
def test_an_old_run_scores_as_it_did(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dist-pca", "evaluate", "runs/old", "--shards", "shards/dusk", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    now, then = json.loads(capsys.readouterr().out), json.loads(Path("scores.json").read_text())
    assert now["iou"] == pytest.approx(then["iou"], abs=1e-2)
    assert now.keys() >= then.keys()
    assert [now[key] for key in ("classes", "images")] == [then[key] for key in ("classes", "images")]


@pytest.mark.slow
def test_an_old_run_is_trained_to_its_end_from_its_checkpoint(old: Path) -> None:
    config = load_config(old / "runs/old/config.yaml")
    before, stored = lines(old), load_file(CHECKPOINT / "model.safetensors")
    before_resuming = json.loads((CHECKPOINT / "state.json").read_text())["windows"][0]
    command = [sys.executable, "-m", "dist_pca.train", "runs/old/config.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    after = lines(old)
    assert [line["step"] for line in after] == [2, 4, 6]
    assert after[0] == before[0]
    # The old code's own steps from the same checkpoint; zeros in place of the stored momentum change them by 1e-3.
    for now, line in zip(after[1:], Path("resumed.jsonl").read_text().splitlines(), strict=True):
        then = rename_metrics(json.loads(line))
        assert [now[term] for term in TERMS] == pytest.approx([then[term] for term in TERMS], rel=3e-4)
        assert now.keys() >= then.keys()
        assert not METRIC_ALIASES.keys() & now.keys()
    # Only step 3 was validated, by the old code, and line 4 covers it with step 4.
    assert after[1]["validation_mean_iou"] == before_resuming["validation_mean_iou"][0]
    assert [launch.step for launch in read_launch_log(old / "runs/old")] == [0, 3]
    # From here on the run folder has the new names, and its config has the same values.
    assert not any(alias.old.rpartition(".")[2] in Path("runs/old/config.yaml").read_text() for alias in KEY_ALIASES)
    assert config_differences(load_config(old / "runs/old/config.yaml"), config) == []
    assert Path("runs/old/checkpoints/latest").read_text().strip() == "step-00000006"
    trained = load_file("runs/old/checkpoints/step-00000006/model.safetensors")
    assert trained.keys() == stored.keys()
    assert any(not torch.equal(trained[name], stored[name]) for name in stored)


def test_the_status_of_an_old_run_has_its_metrics_under_the_new_names(old: Path) -> None:
    run = old / "runs/old"
    (line,) = lines(old)
    status = read_status(run)
    assert (status.state, status.step, status.steps, status.starts) == ("stopped", 3, 6, 1)
    assert status.metrics["mutual_information_bound_features"] == line["nats_over_chance_features"]
    assert status.metrics["seconds"]["communication"] == line["seconds"]["exchange"]
    assert not METRIC_ALIASES.keys() & status.metrics.keys()
    born = json.loads((run / "starts.jsonl").read_text())["born"]
    log_launch(run, 3, 1, {})
    assert "born" not in json.loads((run / "starts.jsonl").read_text().splitlines()[1])
    assert [launch.create_time for launch in read_launch_log(run)] == [born, psutil.Process().create_time()]


@pytest.mark.parametrize("name", ["day", "dusk"])
def test_old_shards_verify_and_hold_what_was_drawn(old: Path, name: str) -> None:
    manifest = load_manifest(old / "shards" / name)
    assert verify(manifest.folder, deep=True, workers=1).problems == []
    assert [len(shard.keys) for shard in manifest.shards] == [2, 2]
    colors = np.array([[90, 90, 90], [120, 170, 220], [180, 40, 40]], np.uint8)
    for shard in manifest.shards:
        for index in range(2):
            members = read_sample(manifest, shard, index)
            image, label = (np.asarray(Image.open(io.BytesIO(members[kind]))) for kind in ("png", "label.png"))
            assert set(np.unique(label)) == {0, 1, 2, 255}
            drawn = np.roll(colors, 1, axis=1) if name == "dusk" else colors
            known = label != 255
            assert (image[known] == drawn[label[known]]).all()
