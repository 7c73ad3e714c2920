"""The command: what it trains, leaves out, writes and prints, and how it goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from dist_pca.cli import app
from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, write_exit_status
from dist_pca.tools.study import training
from tests.support.runs import build_streets, overrides
from tests.tools.study.studies import STEPS, scores_of, small_study, write_finished, write_started


def words(folder: Path, *more: str) -> list[str]:
    """The command line of `small_study`."""
    small_study(folder)
    variants = ["--variant", "plain:", "--variant", "slow: optimizer.lr=1e-5"]
    out = ["--out", str(folder / "out"), "--test", str(folder / "test"), "--set", f"training.steps={STEPS}"]
    return ["study", "demo", *variants, *out, *more]


def invoke(*line: str) -> Result:
    return CliRunner().invoke(app, line)


class Launches:
    """In the place of training: notes which runs are launched, and ends each as it is told."""

    def __init__(self, folder: Path, codes: Callable[[str], int]) -> None:
        self.folder, self.codes = folder, codes
        self.names: list[str] = []

    def __call__(self, command: Sequence[str], folder: Path) -> int:
        self.names.append(folder.name)
        study = small_study(self.folder)
        (run,) = (run for run in study.runs if run.folder == folder)
        code = self.codes(folder.name)
        if code == ExitCode.DONE:
            write_finished(study, run, scores_of((0.1, 0.2, 0.3)))
        else:
            write_started(study, run, 1)
            write_exit_status(folder, code, "so it ended")
        return code


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launches:
    launched = Launches(tmp_path, lambda name: ExitCode.DONE)
    monkeypatch.setattr(training, "launch", launched)
    # What is refused before training needs data; the slow test has them.
    monkeypatch.setattr(training, "check_study", lambda *_, **__: None)
    return launched


def test_every_run_is_trained_once_and_a_second_call_trains_nothing(tmp_path: Path, launches: Launches) -> None:
    done = invoke(*words(tmp_path))
    assert done.exit_code == 0, done.output
    assert launches.names == [f"{variant}-seed{seed}" for seed in (0, 1, 2) for variant in ("plain", "slow")]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"runs", "study.yaml", "study.csv", "summary.csv", "summary.md", "study.png"}
    before = (tmp_path / "out/study.csv").read_bytes()
    assert invoke(*words(tmp_path)).exit_code == 0
    assert len(launches.names) == 6
    assert (tmp_path / "out/study.csv").read_bytes() == before
    # More seeds are trained beside what is there.
    assert invoke(*words(tmp_path, "--seeds", "0,1,2")).exit_code == 0
    assert len(launches.names) == 6


def test_a_failed_run_is_noted_and_the_others_made(tmp_path: Path, launches: Launches) -> None:
    launches.codes = lambda name: ExitCode.DIVERGED if name == "plain-seed1" else ExitCode.DONE
    done = invoke(*words(tmp_path))
    assert done.exit_code == 1
    assert len(launches.names) == 6
    assert "plain-seed1 failed with exit code 65: so it ended" in done.stderr
    assert "Without scores: plain-seed1: so it ended" in done.stderr
    with (tmp_path / "out/study.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_a_failed_run_ends_the_study_where_that_is_wanted(tmp_path: Path, launches: Launches) -> None:
    launches.codes = lambda name: ExitCode.DIVERGED if name == "plain-seed1" else ExitCode.DONE
    assert invoke(*words(tmp_path, "--stop")).exit_code == 1
    assert launches.names == ["plain-seed0", "slow-seed0", "plain-seed1"]


@pytest.mark.parametrize("code", [ExitCode.INTERRUPTED, ExitCode.SAVED])
def test_a_signal_ends_the_study_with_a_table_of_what_is_there(
    tmp_path: Path, launches: Launches, code: ExitCode
) -> None:
    launches.codes = lambda name: code if name == "plain-seed1" else ExitCode.DONE
    done = invoke(*words(tmp_path, "--json"))
    assert done.exit_code == code
    assert launches.names == ["plain-seed0", "slow-seed0", "plain-seed1"]
    found = json.loads(done.stdout)
    assert [len(run["scores"]) for run in found["runs"]] == [1, 1, 0, 0, 0, 0]
    assert found["summaries"][1]["difference"]["pairs"] == 1


def test_ctrl_c_while_scoring_leaves_a_table_too(
    tmp_path: Path, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "score_newest", interrupted)
    done = invoke(*words(tmp_path))
    assert done.exit_code == 130
    assert launches.names == ["plain-seed0"]
    assert (tmp_path / "out/summary.md").is_file()


def test_collecting_trains_nothing_and_a_saved_study_is_enough(tmp_path: Path, launches: Launches) -> None:
    study = small_study(tmp_path)
    write_finished(study, study.runs[0], scores_of((0.1, 0.2, 0.3)))
    # The table is made of what there is, and the exit code says that it is not all.
    assert invoke(*words(tmp_path, "--collect")).exit_code == training.FAILED
    by_options = (tmp_path / "out/study.csv").read_text()
    (tmp_path / "out/study.csv").unlink()
    assert invoke("study", str(tmp_path / "out/study.yaml"), "--collect").exit_code == training.FAILED
    assert (tmp_path / "out/study.csv").read_text() == by_options
    for run in study.runs[1:]:
        write_finished(study, run, scores_of((0.1, 0.2, 0.3)))
    assert invoke(*words(tmp_path, "--collect")).exit_code == 0
    assert launches.names == []


def test_a_dry_run_prints_each_command_and_writes_nothing(tmp_path: Path, launches: Launches) -> None:
    done = invoke(*words(tmp_path, "--dry-run", "--seeds", "7", "--processes", "3"))
    assert done.exit_code == 0
    plain, its, slow, other = done.stdout.splitlines()
    assert (plain, slow) == (f"{tmp_path}/out/runs/plain-seed7", f"{tmp_path}/out/runs/slow-seed7")
    assert f"--num_processes 3 -m dist_pca.train demo training.steps={STEPS} seed=7 name=plain-seed7" in its
    assert "optimizer.lr=1e-5 seed=7" in other
    assert not (tmp_path / "out").exists()
    assert launches.names == []


def test_seeds_may_be_an_axis_of_the_grid(tmp_path: Path, launches: Launches) -> None:
    done = invoke(*words(tmp_path, "--dry-run", "--grid", "seed=3,4"))
    assert [line.rpartition("-")[2] for line in done.stdout.splitlines()[::2]] == ["seed3", "seed3", "seed4", "seed4"]
    again = invoke(*words(tmp_path, "--grid", "seed=3", "--seeds", "1"))
    assert isinstance(again.exception, UserError)


def test_changed_settings_are_refused_before_anything_is_trained(tmp_path: Path, launches: Launches) -> None:
    study = small_study(tmp_path)
    write_finished(study, study.runs[3], scores_of((0.1, 0.2, 0.3)))
    for option in ("--collect", "--dry-run"):
        done = invoke(*words(tmp_path, option, "--set", "data.flip=0"))
        assert isinstance(done.exception, UserError)
        assert "slow-seed1: was started with other settings (data.flip: 0.5 -> 0.0)" in str(done.exception)
    assert launches.names == []


def test_without_matplotlib_all_but_the_picture_is_made(
    tmp_path: Path, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke(*words(tmp_path))
    assert done.exit_code == 0
    assert "no study.png: it needs matplotlib" in done.stderr
    assert not (tmp_path / "out/study.png").exists()


def test_examples_use_options_that_there_are() -> None:
    shown = CliRunner().invoke(app, ["study", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    listed, _, examples = shown.partition("Examples")
    options = {word for word in examples.split() if word.startswith("--")}
    assert options
    for option in options:
        assert f" {option} " in listed, option


def study_line(folder: Path, out: str) -> list[str]:
    """A study of two tiny runs that are really trained, on one process."""
    left_out = ("name=", "output=", "training.steps=", "training.checkpoint_every=")
    keys = [key for key in overrides(folder, "unused") if not key.startswith(left_out)]
    # Long enough to be interrupted between the first and the last step.
    keys += ["training.steps=24", "training.checkpoint_every=4", "data.workers=0"]
    settings = [word for key in keys for word in ("--set", key)]
    options = ["--seeds", "0,1", "--processes", "1", "--test", str(folder / "dusk"), "--out", str(folder / out)]
    return [sys.executable, "-m", "dist_pca.cli", "study", "demo", *options, *settings]


def wait_for(there: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 240
    while not there():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.exhaustive
def test_a_study_that_is_interrupted_and_killed_goes_on_to_the_results_of_one_that_was_not(tmp_path: Path) -> None:
    build_streets(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = subprocess.run(study_line(tmp_path, "whole"), env=environment, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    second = tmp_path / "cut" / "runs" / "demo-seed1"

    with subprocess.Popen(study_line(tmp_path, "cut"), env=environment, start_new_session=True) as process:
        wait_for(lambda: lines(second / "metrics.jsonl") > 0, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    with (tmp_path / "cut/study.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0"]
    scored = (tmp_path / "cut/runs/demo-seed0/scores.json").stat().st_mtime_ns

    with subprocess.Popen(study_line(tmp_path, "cut"), env=environment, start_new_session=True) as process:
        wait_for(lambda: lines(second / "starts.jsonl") > 1, process)
        everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in everything:
            member.kill()
        psutil.wait_procs(everything, timeout=60)

    done = subprocess.run(study_line(tmp_path, "cut"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cut/runs/demo-seed0/scores.json").stat().st_mtime_ns == scored
    tables = []
    for out in ("whole", "cut"):
        with (tmp_path / out / "study.csv").open() as file:
            rows = list(csv.DictReader(file))
        varying = ("run", "seconds_per_step", "peak_memory_bytes", "code")
        tables.append([{key: value for key, value in row.items() if key not in varying} for row in rows])
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]
