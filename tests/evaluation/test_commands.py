import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dist_pca.classes import ClassInfo
from dist_pca.cli import app, main
from dist_pca.config import load_config, save_config
from dist_pca.model.exported import load_exported
from dist_pca.resources import resource
from dist_pca.shards.manifest import save_manifest
from tests.support.networks import CLASSES, segmenter, write_run
from tests.support.runs import build_streets, launch
from tests.support.shards import make_shards


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["dist-pca", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints, labelled and unlabelled shards, and an image."""
    folder = tmp_path_factory.mktemp("commands")
    other = segmenter()
    torch.nn.init.zeros_(other.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    write_run(folder, other, segmenter())
    (folder / "empty").mkdir()
    write_run(folder / "empty")
    make_shards(folder / "labelled", [2, 1])
    make_shards(folder / "unlabelled", [1], labelled=False)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "1.png")
    (folder / "text.png").write_text("not an image")
    return folder


def evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(monkeypatch, "evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_newest_checkpoint_is_scored_unless_another_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folder / "tiny", "--shards", folder / "labelled")
    newest = evaluated(monkeypatch, capsys, *arguments)
    assert evaluated(monkeypatch, capsys, *arguments, "--checkpoint", 2) == newest
    first = evaluated(monkeypatch, capsys, *arguments, "--checkpoint", 1)
    assert first != newest
    assert evaluated(monkeypatch, capsys, *arguments, "--checkpoint", "step-00000001") == first


def test_options_take_the_place_of_the_runs_keys(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {"flip": True, "scales": (1.0, 1.5), "window": (16, 16), "stride": (8, 8)}
    write_run(tmp_path, segmenter(), **keys)
    options = ["--flip", "--scale", 1, "--scale", 1.5, "--window", 16, 16, "--stride", 8, 8]
    by_keys = evaluated(monkeypatch, capsys, tmp_path / "tiny", "--shards", folder / "labelled")
    by_options = evaluated(monkeypatch, capsys, folder / "tiny", "--shards", folder / "labelled", *options)
    assert by_keys == by_options
    # A window of its own does not get the stride of the run's.
    assert run(monkeypatch, "evaluate", tmp_path / "tiny", "--shards", folder / "labelled", "--window", 12, 12) == 0


def test_written_predictions_end_with_a_line_that_says_their_coding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    evaluate = ("evaluate", folder / "tiny", "--shards", folder / "labelled", "--write-predictions", out)
    assert run(monkeypatch, *evaluate) == 0
    assert f"{out}: 3 predictions (Cityscapes ids)" in capsys.readouterr().err
    assert len(list(out.iterdir())) == 3
    assert run(monkeypatch, *evaluate) == 2
    assert f"--write-predictions {out}: exists already" in capsys.readouterr().err


def test_unlabelled_shards_are_predicted_and_not_scored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("evaluate", folder / "tiny", "--shards", folder / "unlabelled", "--write-predictions", out)
    assert run(monkeypatch, *words, "--coding", "train-ids") == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{out}: 1 predictions (train ids of the shards); no scores" in printed.err
    assert [path.name for path in out.iterdir()] == ["0.png"]
    assert set(np.unique(np.asarray(Image.open(out / "0.png")))) <= {0, 1, 2}


def test_other_names_of_classes_are_warned_of_and_may_be_mapped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = evaluated(monkeypatch, capsys, folder / "tiny", "--shards", folder / "labelled")
    manifest = make_shards(tmp_path / "other", [2, 1])
    names = (ClassInfo("Road", (0, 0, 0)), *manifest.classes[1:])
    save_manifest(replace(manifest, classes=names))
    words = ("evaluate", folder / "tiny", "--shards", tmp_path / "other", "--json")
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr()
    assert "no class 'road'; the nearest is 'Road'" in printed.err
    assert "without road, which the means therefore leave out" in printed.err
    found = json.loads(printed.out)
    assert found["missing_classes"] == ["road"]
    assert found["mean_iou"] == pytest.approx(sum(found["iou"][1:]) / 2)
    assert run(monkeypatch, *words, "--class-map", "Road=road") == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert json.loads(printed.out) == right


def test_score_files_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate", folder / "tiny", "--shards", folder / "labelled", "--boundary-iou", "0.02")
    assert run(monkeypatch, *words, "--write-scores", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "boundary IoU" in printed.out
    assert f"{tmp_path}/out: classes.csv, confusion.csv, confusion.png, images.csv, scores.json\n" in printed.err


def test_predict_ends_with_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    predict = ("predict", folder / "tiny", folder / "images", folder / "text.png", "--out", out, "--no-overlay")
    assert run(monkeypatch, *predict, "--on-error", "skip") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: labels (train ids of the run) of 1 image, 1 skipped\n"
    assert printed.err.startswith(f"warning: skipped {folder}/text.png: unreadable image")
    assert (out / "labels" / "images" / "1.png").is_file()
    assert run(monkeypatch, *predict) == 2
    assert "--out" in capsys.readouterr().err
    assert run(monkeypatch, *predict, "--force", "--on-error", "skip") == 0


def test_predict_writes_the_coding_that_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for coding in ("train-ids", "label-ids", "colors"):
        out = tmp_path / coding
        words = ("predict", folder / "tiny", folder / "images", "--out", out, "--no-overlay", "--coding", coding)
        assert run(monkeypatch, *words) == 0
        with Image.open(out / "labels" / "1.png") as image:
            found[coding] = np.asarray(image)
    assert "labels (colours of the classes) of 1 image" in capsys.readouterr().out
    train_ids = found["train-ids"]
    assert np.array_equal(found["label-ids"], np.array([7, 23, 26])[train_ids])
    assert np.array_equal(found["colors"], np.array([info.color for info in CLASSES])[train_ids])


def test_predict_takes_the_ends_of_a_range_as_black_and_white(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (24, 40), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "eight_bits.png")
    Image.fromarray(300 + 10 * grey.astype(np.uint16)).save(tmp_path / "deep.png")

    def labels(name: str, *options: object) -> Any:
        words = ("predict", folder / "tiny", tmp_path / f"{name}.png", "--out", tmp_path / name, "--no-overlay")
        code = run(monkeypatch, *words, *options)
        return code or np.asarray(Image.open(tmp_path / name / "labels" / f"{name}.png"))

    expected = labels("eight_bits")
    assert len(np.unique(expected)) > 1
    assert labels("deep") == 2
    assert "state which values are black and white" in capsys.readouterr().err
    assert np.array_equal(labels("deep", "--range", 300, 2850), expected)


def test_predict_refuses_images_of_more_pixels_than_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("predict", folder / "tiny", folder / "images", "--out", tmp_path / "out", "--max-pixels")
    assert run(monkeypatch, *words, 24 * 40 - 1) == 2
    assert "1.png: more than 959 pixels; raise the bound with --max-pixels" in capsys.readouterr().err
    assert run(monkeypatch, *words, 24 * 40) == 0


def test_export_names_what_it_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", folder / "tiny", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: classes.json, config.json, model.safetensors\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate nowhere --shards labelled", "nowhere: not a run folder"),
        ("evaluate empty/tiny --shards labelled", "empty/tiny: has no checkpoint yet"),
        ("evaluate tiny --shards unlabelled", "have no labels"),
        ("evaluate tiny --shards labelled --checkpoint 7", "checkpoint 7: not in tiny, which has step-00000001, "),
        ("evaluate tiny --shards labelled --checkpoint ../x", "checkpoint ../x: not in tiny"),
        ("evaluate tiny --shards labelled --stride 4 4", "evaluation.stride: has no effect without a window"),
        ("evaluate tiny --shards labelled --scale 0", "evaluation.scales.0: Input should be greater than 0"),
        ("evaluate tiny --shards labelled --window 4 4", "an input of 4 x 4 pixels is too small for the network"),
        ("evaluate tiny --shards labelled --window 0 4", "evaluation.window.0: Input should be greater than 0"),
        ("evaluate tiny --shards labelled --label-set cityscape", "no label set 'cityscape'"),
        (
            "evaluate tiny --shards labelled --write-predictions text.png",
            "--write-predictions text.png: exists already",
        ),
        ("evaluate tiny --shards labelled --write-predictions text.png/out", "text.png/out: cannot be written"),
        ("evaluate tiny --shards labelled --coding colors", "--coding: has no effect without --write-predictions"),
        ("evaluate tiny --shards labelled --boundary-iou 0", "evaluation.boundary_iou: Input should be greater than 0"),
        ("evaluate tiny --shards labelled --class-map road", "--class-map 'road': give each class of the shards once"),
        ("evaluate tiny --shards labelled --class-map a=road", "'a' is not a class of the shards labelled"),
        ("evaluate tiny --shards labelled --class-map road=sky --class-map road=car", "--class-map 'road=car': give"),
        ("evaluate tiny --shards labelled --write-scores text.png", "--write-scores text.png: exists already"),
        (
            "evaluate tiny --shards unlabelled --write-predictions out --write-scores x",
            "--write-scores: the shards unl",
        ),
        (
            "evaluate tiny --shards labelled --write-predictions out/a --write-scores out",
            "--write-scores out, --write-predictions out/a: give folders of which none is in the other",
        ),
        (
            "evaluate tiny --shards labelled --write-predictions out --write-scores ./out",
            "--write-scores out, --write-",
        ),
        ("predict tiny images --out out --range 5 5", "--range 5 5: give two numbers, the lower one first"),
        ("predict tiny images --out out --range 0 nan", "--range 0 nan: give two numbers"),
        ("predict tiny nothing.png --out out", "nothing.png: no such file or folder"),
        ("predict tiny text.png --out out", "text.png: unreadable image"),
        ("predict tiny images --out images", "--out images: exists already"),
        ("predict tiny images --out text.png/out", "--out text.png/out: cannot be written"),
        ("predict tiny images --out out --no-labels --no-overlay", "nothing to write"),
        ("predict empty/tiny images --out out", "has no checkpoint yet"),
        ("export tiny --out images", "--out images: exists already"),
        ("export tiny --out out --onnx-size 8 8", "has no effect without --onnx"),
        ("export nowhere --out out", "nowhere: not a run folder"),
    ],
)
def test_what_cannot_be_done_ends_with_one_line_and_nothing_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert run(monkeypatch, *words.split()) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_examples_use_options_that_there_are(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    listed, _, examples = shown.partition("Examples")
    options = {word for word in examples.split() if word.startswith("--") and word != "--config_file"}
    assert options
    for option in options:
        assert f" {option} " in listed, option


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_stopped_rank_ends_a_distributed_evaluation(tmp_path: Path, rank: int) -> None:
    make_shards(tmp_path / "labelled", [40])
    run = write_run(tmp_path, segmenter())
    config = load_config(run / "config.yaml")
    training = config.training.model_copy(update={"stall_timeout": 6.0})
    save_config(config.model_copy(update={"training": training}), run / "config.yaml")
    command: list[str | Path] = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", resource("launch", "accelerate/cpu"), "-m", "tests.evaluation.slow_evaluate"]
    command += [tmp_path, "evaluate", run, "--shards", tmp_path / "labelled"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    pid_file = tmp_path / f"rank{rank}.pid"
    while not (pid_file.is_file() and pid_file.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(int(pid_file.read_text()), signal.SIGSTOP)
    began = time.monotonic()
    printed = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert time.monotonic() - began < 30
    assert f"rank {rank} (" in printed
    assert "has not responded for" in printed
    assert not (run / "exit.json").exists()


@pytest.mark.slow
def test_a_trained_run_is_scored_applied_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_streets(tmp_path)
    trained = launch(tmp_path, "whole")
    assert trained.returncode == 0, trained.stderr
    trained_run, out = tmp_path / "runs" / "whole", tmp_path / "out"
    evaluate = ("evaluate", trained_run, "--shards", tmp_path / "dusk", "--flip", "--window", 32, 32)
    assert run(monkeypatch, *evaluate, "--write-predictions", out / "results") == 0
    images = sorted((tmp_path / "raw" / "dusk" / "images").iterdir())
    assert len(list((out / "results").iterdir())) == len(images) == 6
    assert run(monkeypatch, "predict", trained_run, *images, "--out", out / "seen") == 0
    assert run(monkeypatch, "export", trained_run, "--out", out / "exported") == 0
    found = load_exported(out / "exported")
    assert found.shorter_edge == 48
    for path in images:
        with Image.open(path) as opened:
            pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        scaled = torch.nn.functional.interpolate(pixels, (48, 72), mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(found.model(scaled).logits, (64, 96), mode="bilinear")
        label = np.asarray(Image.open(out / "seen" / "labels" / path.name))
        assert (logits[0].argmax(0).numpy() == label).mean() > 0.999
    capsys.readouterr()
