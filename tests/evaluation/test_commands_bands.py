"""Command lines on images of other than three bands."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from dist_pca.cli import main
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.label_files import overlay
from dist_pca.model.exported import load_exported
from tests.support.networks import CLASSES, segmenter, write_run
from tests.support.raw_data import make_band_folder
from tests.support.runs import launch

pytest.importorskip("tifffile", reason="tifffile is in the extra `bands`")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["dist-pca", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def in_range(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Twelve bits as the recipe of `make_band_folder` maps them to eight."""
    return np.rint(values / 4095 * 255).astype(np.uint8)


def test_predict_reads_raw_images_as_the_recipe_of_the_shards_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make_band_folder(tmp_path / "raw", 4, samples=2, dtype=np.uint16)
    np.save(tmp_path / "raw/images/001.npy", values[1])
    (tmp_path / "raw/images/001.tif").unlink()
    network = segmenter(bands=4)
    folder = write_run(tmp_path, network, model={"bands": 4})
    words = ("predict", folder, tmp_path / "raw/images", "--recipe", tmp_path / "raw/recipe.yaml", "--shorter-edge", 12)
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 0
    for name, array in zip(("000", "001"), map(in_range, values), strict=True):
        label = np.asarray(Image.open(tmp_path / "out/labels" / f"{name}.png"))
        images = torch.from_numpy(array).permute(2, 0, 1)[None]
        assert np.array_equal(label, predict(network, images, (12, 20), (12, 20))[0].numpy())
        drawn = np.asarray(Image.open(tmp_path / "out/overlays" / f"{name}.png"))
        assert np.array_equal(drawn, np.asarray(overlay(np.ascontiguousarray(array[..., :3]), label, CLASSES)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "takes 4 bands, and without a recipe images are read as RGB; name the recipe of its shards"),
        (("--recipe", "folder"), "takes 4 bands, and folder keeps 3; name the recipe of its shards"),
        (("--recipe", "folder", "--range", 0, 9), "--range: the recipe of --recipe has a range of its own; leave one"),
    ],
)
def test_predict_refuses_what_does_not_say_how_bands_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    folder = write_run(tmp_path, segmenter(bands=4), model={"bands": 4})
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    assert run(monkeypatch, "predict", folder, tmp_path / "a.png", "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_five_bands_are_built_trained_scored_predicted_drawn_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, recipe, out = tmp_path / "raw", tmp_path / "raw/recipe.yaml", tmp_path / "out"
    values = make_band_folder(raw, 5, dtype=np.uint16)
    assert run(monkeypatch, "shards", "build", recipe, "--root", raw, "--out", tmp_path / "day") == 0
    shutil.copytree(tmp_path / "day", tmp_path / "dusk")
    trained = launch(
        tmp_path, "five", "training.steps=2", "training.checkpoint_every=2", f"data.validation={tmp_path}/dusk"
    )
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "five"
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", folder, "--shards", tmp_path / "dusk", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    assert run(monkeypatch, "predict", folder, raw / "images", "--recipe", recipe, "--out", out / "seen") == 0
    assert run(monkeypatch, "matches", folder, "--out", out / "matches") == 0
    assert run(monkeypatch, "report", folder, "--out", out / "report.html") == 0
    assert "Images and cycles of" not in (out / "report.html").read_text()
    assert run(monkeypatch, "export", folder, "--out", out / "exported") == 0
    found = load_exported(out / "exported")
    images = torch.from_numpy(in_range(values[0])).permute(2, 0, 1)[None].float() / 255
    scaled = torch.nn.functional.interpolate(images, (48, 80), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(found.model(scaled).logits, (12, 20), mode="bilinear")
    label = np.asarray(Image.open(out / "seen/labels/000.png"))
    assert (logits[0].argmax(0).numpy() == label).mean() > 0.99
