"""`dist-pca report`: images, scores and cycles that networks are run for, and what is said where they cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from dist_pca.cli import app
from dist_pca.config import load_config, save_config
from dist_pca.errors import UserError
from tests.evaluation.run_report.runs import Page
from tests.support.networks import CLASSES, segmenter, write_run
from tests.support.shards import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a run `tiny` with two checkpoints, and a run `other` with one."""
    folder = tmp_path_factory.mktemp("report")
    other = segmenter()
    torch.nn.init.normal_(other.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    write_run(folder, segmenter(), other)
    shutil.copytree(folder / "tiny", folder / "other")
    shutil.rmtree(folder / "other" / "checkpoints" / "step-00000002")
    (folder / "other" / "checkpoints" / "latest").write_text("step-00000001\n")
    make_shards(folder / "source", [4])
    make_shards(folder / "target", [5])
    make_shards(folder / "unlabelled", [4], labelled=False)
    for name in ("tiny", "other"):
        file = folder / name / "config.yaml"
        keys = [f"data.source={folder}/source", f"data.target={folder}/unlabelled"]
        save_config(load_config(file, keys), file)
    return folder


def report(folder: Path, *words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words), "--out", str(folder / "report.html")])


def page(folder: Path, *words: object) -> Page:
    done = report(folder, *words)
    assert done.exit_code == 0, done.output
    return Page((folder / "report.html").read_text())


def alts(page: Page) -> list[str]:
    return [values["alt"] or "" for tag, values in page.attributes if tag == "img"]


def test_labelled_shards_give_scores_errors_and_pictures_before_and_after(folder: Path, tmp_path: Path) -> None:
    shown = page(tmp_path, folder / "tiny", "--target", folder / "target", "--pictures", 2)
    scored = CliRunner().invoke(app, ["evaluate", str(folder / "tiny"), "--shards", str(folder / "target"), "--json"])
    expected = json.loads(scored.stdout)
    assert f"{100 * expected['mean_iou']:.1f} % mIoU on 5 images" in shown.text
    for info, iou in zip(CLASSES, expected["iou"], strict=True):
        assert shown.row(info.name)[0] == ("-" if iou is None else f"{100 * iou:.1f}")
    keys = [alt.removeprefix("Image ") for alt in alts(shown) if alt.startswith("Image ")]
    assert keys == ["000-000", "000-002"]
    for title in ("step 1", "tiny"):
        assert [f"Labels of {key} that {title} predicts" in alts(shown) for key in keys] == [True, True]
        assert [f"Where {title} is wrong on {key}" in alts(shown) for key in keys] == [True, True]
    assert len([alt for alt in alts(shown) if "cycles drawn as lines" in alt]) == 2
    assert "Target images: " not in shown.text
    assert "Cycles of tiny: " not in shown.text


def test_a_run_and_its_baseline_are_columns_of_one_report(folder: Path, tmp_path: Path) -> None:
    words = (folder / "tiny", "--baseline", folder / "other", "--target", folder / "target", "--pictures", 1)
    shown = page(tmp_path, *words)
    assert shown.row("") == ["other", "tiny"]
    before, after, difference = (float(cell) for cell in shown.row("mean IoU"))
    assert difference == pytest.approx(after - before, abs=0.11)
    assert "other: true class in rows" in shown.text
    assert "tiny: true class in rows" in shown.text
    assert "step 1" not in " ".join(alts(shown))


def test_without_target_the_runs_own_shards_are_shown_and_nothing_is_scored(folder: Path, tmp_path: Path) -> None:
    shown = page(tmp_path, folder / "other", "--pictures", 3)
    assert len([alt for alt in alts(shown) if "that other predicts" in alt]) == 3
    assert not any("wrong" in alt or "True labels" in alt for alt in alts(shown))
    assert "They have no labels" in shown.text
    assert "mIoU" not in shown.text
    assert "Scores: scores.json holds none; add --target SHARDS" in shown.text


def test_what_cannot_be_shown_is_said_in_the_report_and_what_was_asked_for_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "other", tmp_path / "moved")
    file = tmp_path / "moved" / "config.yaml"
    save_config(load_config(file, ["data.source=gone", "data.target=gone"]), file)
    shown = page(tmp_path, tmp_path / "moved")
    assert "Target images: shards gone: no such folder" in shown.text
    assert "Cycles of moved: shards gone: no such folder" in shown.text
    for options in (("--target", "gone"), ("--baseline", "gone")):
        error = report(tmp_path, folder / "other", *options).exception
        assert isinstance(error, UserError)
        assert str(error).startswith(("shards gone: ", "gone: not a run folder"))
    shutil.rmtree(tmp_path / "moved" / "checkpoints")
    assert "Images and cycles of moved: " in page(tmp_path, tmp_path / "moved").text


def test_no_pictures_run_no_network(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "other", tmp_path / "broken")
    weights = tmp_path / "broken" / "checkpoints" / "step-00000001" / "model.safetensors"
    save_file(dict(list(load_file(weights).items())[:1]), weights)
    assert report(tmp_path, tmp_path / "broken", "--pictures", 0).exit_code == 0
    assert "checkpoint" in page(tmp_path, tmp_path / "broken").text


def test_a_file_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    error = report(tmp_path, folder / "other", "--pictures", 0).exception
    assert isinstance(error, UserError)
    assert "give another file" in str(error)
