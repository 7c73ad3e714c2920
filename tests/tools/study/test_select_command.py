import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dist_pca.cli import app
from dist_pca.data.stream import evaluation_stream
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.study import selection
from tests.support.networks import CLASSES, segmenter, write_run
from tests.support.shards import make_shards, sample_members, write_shards
from tests.tools.study.test_selection import shaken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    collapsed = segmenter()
    torch.nn.init.zeros_(collapsed.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    torch.nn.init.zeros_(collapsed.head.classifier.bias)  # type: ignore[union-attr, arg-type]
    certain = segmenter()
    torch.nn.init.zeros_(certain.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        certain.head.classifier.bias.copy_(50 * torch.eye(len(CLASSES))[0])  # type: ignore[union-attr, operator]
    write_run(folder / "e", certain)
    for name, network in (("a", shaken(0.02, 1)), ("b", segmenter()), ("c", collapsed), ("d", shaken(0.02, 2))):
        write_run(folder / name, network)
    write_run(folder / "two", shaken(0.5, 3), segmenter(), shaken(0.02, 4))
    make_shards(folder / "target", [3])
    make_shards(folder / "source", [2])
    return folder


def select(folder: Path, names: str, *more: str) -> Result:
    runs = [str(folder / name / "tiny") for name in names.split()]
    return CliRunner().invoke(app, ["select", *runs, "--target", str(folder / "target"), *more])


def test_the_table_ends_with_the_chosen_run(folder: Path) -> None:
    done = select(folder, "a b c d")
    assert done.exit_code == 0, done.output
    chosen = json.loads(select(folder, "a b c d", "--json").stdout)["chosen"]["run"]
    assert done.stdout.splitlines()[-1] == chosen
    assert chosen != str(folder / "c" / "tiny")
    assert "true mIoU is" in done.stderr


def test_the_json_tells_scores_guards_and_what_the_choice_was_worth(folder: Path) -> None:
    done = select(folder, "a b c d", "--json", "--source-validation", str(folder / "source"), "--tolerance", "100")
    found = json.loads(done.stdout)
    assert (found["rule"], found["images"]) == ("information", 3)
    collapsed = found["candidates"][2]
    assert collapsed["classes"] == 1
    assert collapsed["out"][0].startswith("collapsed")
    assert collapsed["information"] == pytest.approx(0, abs=1e-6)
    assert found["chosen"] == max(found["candidates"], key=lambda row: row["information"] * row["agreement"])
    assert all(0 <= row["agreement"] <= 1 and row["source_mean_iou"] > 0 for row in found["candidates"])
    true = [row["true_mean_iou"] for row in found["candidates"]]
    assert found["regret"] == pytest.approx(max(true) - found["chosen"]["true_mean_iou"])


def test_an_excluded_candidate_has_no_vote_in_the_ensemble(folder: Path) -> None:
    found, expected = (
        {row["run"]: row["agreement"] for row in json.loads(done.stdout)["candidates"]}
        for done in (select(folder, names, "--json", "--rule", "agreement") for names in ("a b d e", "a b d"))
    )
    assert {run: found[run] for run in expected} == expected


def test_other_labels_on_the_same_images_leave_the_choice_and_change_the_report(folder: Path, tmp_path: Path) -> None:
    members = [sample_members(index) for index in range(3)]
    turned = [
        {**own, "label.png": other["label.png"]} for own, other in zip(members, members[1:] + members[:1], strict=True)
    ]
    bare = [{name: value for name, value in own.items() if name != "label.png"} for own in members]
    write_shards(tmp_path / "true", [members])
    write_shards(tmp_path / "turned", [turned])
    write_shards(tmp_path / "bare", [bare], labelled=False)
    found = [
        json.loads(select(folder, "a b c d", "--json", "--target", str(tmp_path / name)).stdout)
        for name in ("true", "turned", "bare")
    ]
    known = ("run", "step", "information", "agreement", "classes", "entropy", "out")
    chosen = [[{key: row[key] for key in known} for row in each["candidates"]] for each in found]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len({each["chosen"]["run"] for each in found}) == 1
    assert found[0]["candidates"][0]["true_mean_iou"] != found[1]["candidates"][0]["true_mean_iou"]
    assert found[2]["regret"] is None
    assert found[2]["candidates"][0]["true_mean_iou"] is None


def test_labels_are_looked_at_after_the_choice_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stream(manifest: Manifest, *arguments: Any, **options: Any) -> Any:
        asked.append(manifest.labelled)
        return evaluation_stream(manifest, *arguments, **options)

    monkeypatch.setattr(selection, "evaluation_stream", stream)
    assert select(folder, "a b d").exit_code == 0
    assert asked == [False]


def test_a_checkpoint_is_given_as_evaluate_takes_it(folder: Path) -> None:
    done = select(folder, "two", "--all-checkpoints")
    assert done.exit_code == 0, done.output
    run, option, checkpoint = done.stdout.splitlines()[-1].split()
    assert (run, option) == (str(folder / "two" / "tiny"), "--checkpoint")
    shards = ["--shards", str(folder / "target"), "--json"]
    assert CliRunner().invoke(app, ["evaluate", run, option, checkpoint, *shards]).exit_code == 0


def test_two_candidates_have_information_and_no_majority(folder: Path) -> None:
    found = json.loads(select(folder, "a b", "--json").stdout)
    assert found["chosen"] == max(found["candidates"], key=lambda row: row["information"] * row["agreement"])
    done = select(folder, "a b", "--rule", "agreement")
    assert isinstance(done.exception, UserError)
    assert "--rule information" in str(done.exception)


def test_fewer_images_may_be_looked_at(folder: Path) -> None:
    assert json.loads(select(folder, "a b d", "--json", "--max-images", "2").stdout)["images"] == 2


def test_true_scores_are_those_that_evaluate_gives(folder: Path) -> None:
    row = json.loads(select(folder, "a b d", "--json").stdout)["candidates"][1]
    done = CliRunner().invoke(app, ["evaluate", row["run"], "--shards", str(folder / "target"), "--json"])
    assert row["true_mean_iou"] == pytest.approx(json.loads(done.stdout)["mean_iou"])


def test_examples_use_options_that_there_are() -> None:
    shown = CliRunner().invoke(app, ["select", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    listed, _, examples = shown.partition("Examples")
    options = {word for word in examples.split() if word.startswith("--")}
    assert options
    for option in options:
        assert f" {option} " in listed, option
