"""`dist-pca matches`: what it prints and writes, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from dist_pca.classes import ClassInfo
from dist_pca.cli import app
from dist_pca.config import load_config, save_config
from dist_pca.errors import UserError
from tests.support.networks import CLASSES, segmenter, write_run
from tests.support.runs import build_streets, launch
from tests.support.shards import make_shards, sample_members, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matches")
    other = segmenter()
    torch.nn.init.normal_(other.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    write_run(folder, segmenter(), other)
    make_shards(folder / "source", [4])
    make_shards(folder / "target", [3])
    return folder


def matches(folder: Path, *more: str) -> Result:
    shards = [] if "--target" in more else ["--target", str(folder / "target")]
    given = [*("matches", str(folder / "tiny"), "--source", str(folder / "source")), *shards, *more]
    return CliRunner().invoke(app, [*given, "--batches", "2", "--images", "2"])


def refusal(folder: Path, *more: str) -> str:
    error = matches(folder, *more).exception
    assert isinstance(error, UserError), error
    return str(error)


def test_the_table_has_each_class_and_the_hubs(folder: Path) -> None:
    done = matches(folder)
    assert done.exit_code == 0, done.output
    assert "step-00000002, features, scope world" in done.stdout
    assert "step-00000002, predictions, scope world" in done.stdout
    assert done.stdout.count("hubs: 1 % of the target's pixels receive") == 2
    assert all(info.name in done.stdout for info in CLASSES)


def test_checkpoints_are_compared_in_a_table_of_their_own_that_tells_what_json_does(folder: Path) -> None:
    assert "over training" not in matches(folder).stdout
    blocks = json.loads(matches(folder, "--all-checkpoints", "--json").stdout)["blocks"]
    rows = matches(folder, "--all-checkpoints").stdout.partition("over training, scope world")[2].splitlines()
    for block in blocks:
        (row,) = [row for row in rows if row.startswith(block["level"]) and block["checkpoint"] in row]
        names = ("correct_ratio", "kept_correct_ratio", "wrong_weight", "cover_ratio")
        shares = ["" if block[name] is None else f"{100 * block[name]:.1f}" for name in names]
        assert row.split()[2:6] == [share for share in shares if share][:4]


def test_csv_json_and_pictures_tell_the_same_of_every_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = matches(folder, "--all-checkpoints", "--json", "--out", str(out), "--scope", "pair", "--pictures", "1")
    blocks = json.loads(done.stdout)["blocks"]
    with (out / "matches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(blocks) == 4
    for block in blocks:
        own = [row for row in rows if all(row[key] == block[key] for key in ("checkpoint", "level", "scope"))]
        assert sum(int(row["matches"]) for row in own) == block["matches"]
        assert sum(int(row["kept"]) for row in own) == block["kept"]
        assert sum(float(row["weight"]) for row in own) == pytest.approx(1, abs=1e-4)
        known = [row for row in own if row["true_class"] != "no label"]
        right = sum(int(row["matches"]) for row in known if row["source_class"] == row["true_class"])
        assert right / sum(int(row["matches"]) for row in known) == pytest.approx(block["correct_ratio"])
    pictures = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert pictures == [
        f"{step}/matches-{level}-1.png"
        for step in ("step-00000001", "step-00000002")
        for level in ("features", "predictions")
    ]


def test_a_level_alone_carries_what_it_carries_beside_the_other(folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, segmenter())
    for name in ("source", "target"):
        (tmp_path / name).symlink_to(folder / name)
    balanced = ("objective.association.class_balanced=true", "objective.association.class_weights=kept_share")
    save_config(load_config(run / "config.yaml", balanced), run / "config.yaml")
    both = json.loads(matches(tmp_path, "--json").stdout)["blocks"]
    assert [block["level"] for block in both] == ["features", "predictions"]
    for block in both:
        assert json.loads(matches(tmp_path, "--json", "--level", block["level"]).stdout)["blocks"] == [block]


def test_other_labels_of_the_same_target_judge_the_same_cycles(folder: Path, tmp_path: Path) -> None:
    members = [sample_members(index) for index in range(3)]
    turned = [
        {**own, "label.png": other["label.png"]} for own, other in zip(members, members[1:] + members[:1], strict=True)
    ]
    found = []
    for name, samples in (("true", members), ("turned", turned)):
        write_shards(tmp_path / name, [samples])
        found.append(json.loads(matches(folder, "--json", "--target", str(tmp_path / name)).stdout)["blocks"])
    for one, other in zip(*found, strict=True):
        assert [one[key] for key in ("matches", "kept", "cover_ratio")] == [
            other[key] for key in ("matches", "kept", "cover_ratio")
        ]
        assert one["hubs"]["share"] == other["hubs"]["share"]
    assert found[0] != found[1]


def test_whole_frames_have_more_pixels_than_crops(folder: Path) -> None:
    crops, frames = (
        json.loads(matches(folder, "--json", "--level", "features", *more).stdout)["blocks"][0]["matches"]
        for more in ((), ("--whole-frames",))
    )
    assert frames > crops


def test_a_target_without_labels_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = [{name: value for name, value in sample_members(0).items() if name != "label.png"}]
    write_shards(tmp_path / "bare", [bare], labelled=False)
    assert "matches can be judged only where target labels are known" in refusal(
        folder, "--target", str(tmp_path / "bare")
    )


def test_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    other = (CLASSES[0], CLASSES[1], ClassInfo("boat", (1, 2, 3)))
    for name in ("source", "target"):
        write_shards(tmp_path / name, [[sample_members(0)]], classes=other)
    shards = ("--target", str(tmp_path / "target"))
    assert "class tables differ" in refusal(folder, *shards)
    assert "classes road, sky, boat where the run has road, sky, car" in refusal(
        folder, *shards, "--source", str(tmp_path / "source")
    )


def test_shards_of_other_bands_are_refused_with_both(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path, segmenter(bands=4), model={"bands": 4})
    for name in ("source", "target"):
        (tmp_path / name).symlink_to(folder / name)
    assert "images of 3 bands, and the network takes 4; name shards of 4" in refusal(tmp_path)


def test_runs_without_the_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "has no checkpoint yet" in refusal(write_run(tmp_path).parent, "--target", str(folder / "target"))
    assert "checkpoint 7: not in" in refusal(folder, "--checkpoint", "7")
    assert "leave one of them out" in refusal(folder, "--checkpoint", "1", "--all-checkpoints")


def test_a_teacher_needs_a_use_and_an_average(folder: Path, tmp_path: Path) -> None:
    assert "--teacher" in refusal(folder, "--teacher")
    run = write_run(tmp_path, segmenter())
    for name in ("source", "target"):
        (tmp_path / name).symlink_to(folder / name)
    config = load_config(run / "config.yaml", ["objective.association.teacher_check=true", "training.ema_decay=0.9"])
    save_config(config, run / "config.yaml")
    assert "add --no-teacher" in refusal(tmp_path)
    without = json.loads(matches(tmp_path, "--no-teacher", "--json").stdout)["blocks"]
    weights = load_file(run / "checkpoints" / "step-00000001" / "model.safetensors")
    save_file(weights, run / "checkpoints" / "step-00000001" / "ema.safetensors")
    checked = json.loads(matches(tmp_path, "--json").stdout)["blocks"]
    assert matches(tmp_path, "--diffusion", "0").exit_code == 0
    for one, other in zip(without, checked, strict=True):
        assert one["matches"] == other["matches"]
        assert one["consistent_ratio"] == other["consistent_ratio"]
        assert one["kept"] > other["kept"]
    config = load_config(run / "config.yaml", ["objective.association.teacher_matches=true"])
    save_config(config, run / "config.yaml")
    assert "--diffusion: changes no match of this run" in refusal(tmp_path, "--diffusion", "0")
    assert matches(tmp_path, "--diffusion", "0", "--no-teacher").exit_code == 0


def test_a_folder_that_is_there_is_refused_before_anything_runs(folder: Path) -> None:
    assert "exists already" in refusal(folder, "--out", str(folder / "target"))


@pytest.mark.slow
def test_a_trained_run_is_shown_on_its_own_shards_over_training(tmp_path: Path) -> None:
    build_streets(tmp_path)
    done = launch(tmp_path, "tiny", "training.ema_decay=0.5", "objective.association.teacher_check=true")
    assert done.returncode == 0, done.stderr
    shown = CliRunner().invoke(
        app, ["matches", f"{tmp_path}/runs/tiny", "--all-checkpoints", "--json", "--out", f"{tmp_path}/out"]
    )
    assert shown.exit_code == 0, shown.output
    blocks = json.loads(shown.stdout)["blocks"]
    assert [block["checkpoint"] for block in blocks] == ["step-00000003"] * 2 + ["step-00000006"] * 2
    assert all(0 < block["cover_ratio"] <= 1 and 0 <= block["correct_ratio"] <= 1 for block in blocks)
    assert (tmp_path / "out" / "step-00000006" / "matches-features-1.png").is_file()
