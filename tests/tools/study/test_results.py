import csv
import json
import math
from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import write_exit_status
from dist_pca.shards.manifest import load_manifest
from dist_pca.tools.study.results import collect, summarise, to_json, write_results
from dist_pca.tools.study.scoring import cached_scores
from dist_pca.tools.study.tables import notes, tables, write_markdown
from dist_pca.tools.study.training import open_tests, refuse_changed_settings
from tests.support.shards import make_shards
from tests.tools.study.studies import STEPS, checkpoint_of, scores_of, small_study, write_finished, write_started

PLAIN = {0: (0.30, 0.6, 0.0), 1: (0.30, 0.6, 0.0), 2: (0.30, 0.6, 0.0)}
SLOW = {0: (0.33, 0.6, 0.0), 1: (0.39, 0.6, 0.0), 2: (0.45, 0.6, math.nan)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of which all runs are finished."""
    study = small_study(tmp_path)
    for run in study.runs:
        scores = (PLAIN if run.variant == "plain" else SLOW)[run.seed]
        write_finished(study, run, scores_of(scores, {"all": scores[0]}))
    return tmp_path


def test_each_run_is_a_row_with_the_numbers_of_its_scores(folder: Path) -> None:
    study = small_study(folder)
    results = collect(study, open_tests(study))
    write_results(study, results, summarise(study, results))
    with (study.out / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], int(row["seed"])) for row in rows] == [
        (variant, seed) for seed in (0, 1, 2) for variant in ("plain", "slow")
    ]
    last = rows[-1]
    assert list(last) == [
        *("variant", "seed", "shards", "run", "step", "images", "mean_iou", "pixel_accuracy", "mean_iou_all"),
        *("iou_road", "iou_sky", "iou_car", "seconds_per_step", "peak_memory_bytes", "code"),
    ]
    assert (last["iou_road"], last["iou_car"], last["mean_iou"]) == ("0.45", "", "")
    assert (last["shards"], last["step"], last["images"], last["code"]) == (str(folder / "test"), str(STEPS), "2", "1")
    # Of 1, 2, 3, 4 seconds and bytes.
    assert (last["seconds_per_step"], last["peak_memory_bytes"]) == ("2.5", "4")
    assert last["run"] == str(study.out / "runs" / "slow-seed2")


def test_a_variant_is_summed_up_over_its_seeds_and_compared_seed_by_seed(folder: Path) -> None:
    study = small_study(folder)
    results = collect(study, open_tests(study))
    summaries = summarise(study, results)
    write_results(study, results, summaries)
    plain, slow = summaries
    assert plain.difference is None
    assert (plain.mean_iou, plain.lowest, plain.highest) == pytest.approx((0.3, 0.3, 0.3))
    road = slow.class_differences["road"]
    assert road is not None
    # .03, .09, .15: s = .06.
    assert (road.pairs, road.mean) == (3, pytest.approx(0.09))
    assert road.standard_error == pytest.approx(0.06 / math.sqrt(3))
    car = slow.class_differences["car"]
    assert car is not None
    assert car.pairs == 2
    with (study.out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["difference_mean"] == ""
    assert float(rows[1]["iou_difference_road"]) == pytest.approx(0.09)
    assert float(rows[1]["iou_difference_standard_error_road"]) == pytest.approx(0.06 / math.sqrt(3))
    assert float(rows[1]["iou_road"]) == pytest.approx(0.39)
    assert float(rows[1]["seconds_per_step"]) == 2.5


def test_the_tables_say_points_per_cent_and_pairs(folder: Path) -> None:
    study = small_study(folder, seeds=(0, 1))
    results = collect(study, open_tests(study))
    summaries = summarise(study, results)
    (title, rows), (_, classes), (_, differences) = tables(study, summaries)
    assert title == f"out on {folder / 'test'}"
    assert rows[0]["difference"] == "baseline"
    # mIoU .31 and .33 against .30: mean .02, s / sqrt(2) = .01, t(1) = 12.7.
    assert (rows[1]["mIoU"], rows[1]["range"], rows[1]["n"]) == ("32.0", "31.0-33.0", "2")
    assert (rows[1]["difference"], rows[1]["95% interval"]) == ("+2.0 ± 1.0", "-10.7 to +14.7")
    assert classes[0] == {"class": "road", "plain": "30.0", "slow": "36.0"}
    assert differences[1] == {"class": "sky", "slow": "+0.0 ± 0.0"}
    write_markdown(study, results, summaries)
    text = (study.out / "summary.md").read_text()
    assert "| road | 30.0 | 36.0 |" in text
    assert "Student's 95% interval" in text


def test_the_json_has_everything_and_no_nan(folder: Path) -> None:
    study = small_study(folder)
    results = collect(study, open_tests(study))
    found = json.loads(
        to_json(study, results, summarise(study, results)), parse_constant=lambda name: pytest.fail(name)
    )
    assert len(found["runs"]) == 6
    assert found["runs"][1]["scores"][str(folder / "test")]["iou"][0] == 0.33
    assert found["summaries"][1]["class_differences"]["road"]["pairs"] == 3
    assert found["variants"] == {"plain": [], "slow": ["optimizer.lr=1e-5"]}


def test_scores_are_those_of_one_checkpoint_on_one_set_of_shards_under_one_protocol(folder: Path) -> None:
    study = small_study(folder)
    run = study.runs[0].folder
    test, checkpoint = load_manifest(folder / "test"), checkpoint_of(run, STEPS)
    assert cached_scores(run, test, checkpoint) is not None
    assert cached_scores(run, make_shards(folder / "other", [1]), checkpoint) is None
    state = checkpoint / "state.json"
    first = state.read_text()
    # The same step, trained once more.
    state.write_text(json.dumps({**json.loads(first), "id": "another"}))
    assert cached_scores(run, test, checkpoint) is None
    state.write_text(first)
    assert cached_scores(run, test, checkpoint) is not None
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("flip: false", "flip: true"))
    assert cached_scores(run, test, checkpoint) is None


def test_a_damaged_file_of_scores_holds_none(folder: Path) -> None:
    run = small_study(folder).runs[0].folder
    for text in ("{", "[1]", "{}", "[]"):
        (run / "scores.json").write_text(text)
        assert cached_scores(run, load_manifest(folder / "test"), checkpoint_of(run, STEPS)) is None


def test_what_is_missing_is_said_run_by_run_and_does_not_count(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    finished, started, diverged, unscored = study.runs[:4]
    write_finished(study, finished, scores_of((0.5, 0.5, 0.5)))
    write_started(study, started, 2)
    write_started(study, diverged, 1)
    write_exit_status(diverged.folder, 65, "diverged at step 2")
    write_started(study, unscored, STEPS)
    results = collect(study, open_tests(study))
    assert [result.message for result in results] == [
        *("", f"step 2 of {STEPS}", "diverged at step 2", "not scored yet", "not started", "not started")
    ]
    (only,) = summarise(study, results)
    assert (only.variant, only.seeds) == ("plain", 1)
    assert sum(line.startswith("Without scores: ") for line in notes(study, results)) == 5


def test_a_started_run_of_other_settings_is_refused_and_the_key_named(folder: Path) -> None:
    refuse_changed_settings(small_study(folder))
    changed = small_study(folder, settings=(f"training.steps={STEPS}", "optimizer.weight_decay=0.5"))
    with pytest.raises(UserError, match=r"optimizer\.weight_decay: 0\.01 -> 0\.5.*another --out"):
        refuse_changed_settings(changed)
    # What says where and how a run is made may change, and so may the seeds.
    refuse_changed_settings(small_study(folder, settings=(f"training.steps={STEPS}", "data.workers=0")))
    refuse_changed_settings(small_study(folder, seeds=(0, 1, 2, 3)))


def test_unlabelled_test_shards_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "bare", [1], labelled=False)
    with pytest.raises(UserError, match="has no labels"):
        open_tests(small_study(tmp_path, tests=(str(tmp_path / "bare"),)))


def test_runs_of_different_code_are_pointed_out(folder: Path) -> None:
    study = small_study(folder)
    manifests = open_tests(study)
    assert not any("different code" in line for line in notes(study, collect(study, manifests)))
    state = study.runs[0].folder / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    state.write_text(json.dumps({"step": STEPS, "code": "2"}))
    assert "Runs were made by different code: 1, 2." in notes(study, collect(study, manifests))
