"""Whether a job that ended is started again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_pca.config import load_config
from dist_pca.resilience.exit_status import ExitCode, read_exit_status, write_exit_status
from dist_pca.resources import resource
from dist_pca.tools.cluster.job import FRUITLESS_STARTS, GAVE_UP, app, judge, launcher
from dist_pca.training.run_folder import Launch
from tests.tools.cluster.test_status import STEPS, make_run


def start(step: int, restart: int, job: str = "7") -> Launch:
    return Launch(0.0, step, 2, "elsewhere", 1, 0.0, job, restart)


@pytest.mark.parametrize("code", [ExitCode.SAVED, ExitCode.LOST_RANK])
def test_a_job_that_saved_or_lost_a_rank_is_started_again(tmp_path: Path, code: ExitCode) -> None:
    run = make_run(tmp_path, saved=30, starts=(start(0, 0),))
    write_exit_status(run, code, "start it again")
    assert judge(run, job="7", restart=0, signalled=False) == (ExitCode.SAVED, "start it again")


@pytest.mark.parametrize(
    "code", [ExitCode.DONE, ExitCode.REFUSED, ExitCode.DIVERGED, ExitCode.INTERRUPTED], ids=lambda code: code.name
)
def test_any_other_end_is_the_end(tmp_path: Path, code: ExitCode) -> None:
    run = make_run(tmp_path, saved=30, starts=(start(0, 0),))
    write_exit_status(run, code, "that was it")
    assert judge(run, job="7", restart=0, signalled=True) == (code, "that was it")


def test_a_signal_before_ranks_listen_loses_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert judge(run, job="7", restart=0, signalled=True).code == ExitCode.SAVED
    assert judge(tmp_path / "not even a folder", job="7", restart=0, signalled=True).code == ExitCode.SAVED


def test_an_end_that_nobody_explains_is_a_failure(tmp_path: Path) -> None:
    verdict = judge(make_run(tmp_path, saved=30), job="7", restart=0, signalled=False)
    assert verdict.code == GAVE_UP
    assert "slurm" in verdict.message


@pytest.mark.parametrize("signalled", [False, True])
def test_a_start_that_made_steps_and_ended_without_a_word_has_lost_a_rank(tmp_path: Path, signalled: bool) -> None:
    run = make_run(tmp_path, told=40, saved=30, starts=(start(0, 0), start(30, 1)))
    verdict = judge(run, job="7", restart=1, signalled=signalled)
    assert verdict.code == ExitCode.SAVED
    assert "had made step 40" in verdict.message


@pytest.mark.parametrize(("told", "restart", "job"), [(30, 1, "7"), (40, 2, "7"), (40, 1, "8")])
def test_a_start_that_made_no_step_is_not_credited_with_those_of_others(
    tmp_path: Path, told: int, restart: int, job: str
) -> None:
    run = make_run(tmp_path, told=told, saved=30, starts=(start(0, 0), start(30, 1)))
    assert judge(run, job=job, restart=restart, signalled=False).code == GAVE_UP


def test_starts_that_crash_before_they_save_are_bounded(tmp_path: Path) -> None:
    codes = []
    for restart in range(4):
        folder = tmp_path / str(restart)
        folder.mkdir()
        run = make_run(folder, told=20, starts=tuple(start(0, number) for number in range(restart + 1)))
        codes.append(judge(run, job="7", restart=restart, signalled=False).code)
    assert codes == [ExitCode.SAVED] * (FRUITLESS_STARTS - 1) + [GAVE_UP] * (5 - FRUITLESS_STARTS)


def test_a_finished_run_that_is_started_again_is_done(tmp_path: Path) -> None:
    assert judge(make_run(tmp_path, saved=STEPS), job="7", restart=0, signalled=False).code == ExitCode.DONE


@pytest.mark.parametrize("begun", [True, False])
def test_starts_that_save_no_step_are_bounded(tmp_path: Path, begun: bool) -> None:
    # The first start reached step 30 and the others none; some of them may not even have got as far as to say so.
    later = tuple(start(30, restart) for restart in range(1, 10)) if begun else ()
    run = make_run(tmp_path, saved=30, starts=(start(0, 0), *later))
    write_exit_status(run, ExitCode.LOST_RANK, "rank 1 died")
    codes = [judge(run, job="7", restart=restart, signalled=False).code for restart in range(6)]
    assert codes == [ExitCode.SAVED] * FRUITLESS_STARTS + [GAVE_UP] * (6 - FRUITLESS_STARTS)


def test_a_job_that_never_saves_is_started_so_often_and_no_more(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    codes = [judge(run, job="7", restart=restart, signalled=True).code for restart in range(4)]
    assert codes.count(ExitCode.SAVED) == FRUITLESS_STARTS - 1


def test_another_job_begins_to_count_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, saved=30, starts=(start(0, 9, job="6"),))
    write_exit_status(run, ExitCode.SAVED, "out of time")
    assert judge(run, job="7", restart=1, signalled=False).code == ExitCode.SAVED


@pytest.mark.parametrize(
    ("override", "gpus", "name"),
    [
        ("training.zero_stage=null", 8, "multi_node"),
        ("training.zero_stage=1", 8, "multi_node_zero1"),
        ("training.zero_stage=2", 8, "multi_node"),
        ("training.zero_stage=3", 8, "multi_node_zero3"),
        ("training.zero_stage=3", 0, "multi_node_cpu"),
    ],
)
def test_the_launcher_is_that_of_the_runs_stage(override: str, gpus: int, name: str) -> None:
    assert launcher(load_config(resource("configs", "demo"), [override]), gpus).stem == name


def test_begin_forgets_the_last_end_and_end_gives_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, saved=30, starts=(start(0, 0),))
    write_exit_status(run, ExitCode.DIVERGED, "of the last start")
    begin = ("begin", "--gpus", "8", "demo", "name=run", f"output={tmp_path}", "--resume")
    said = CliRunner().invoke(app, begin).stdout.splitlines()
    assert said == [str(run), str(resource("launch", "accelerate/multi_node"))]
    assert read_exit_status(run) is None
    (run / "exit.json").write_text(json.dumps({"code": 75, "message": "saved"}))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ended = CliRunner().invoke(app, ["end", str(run)])
    assert (ended.exit_code, ended.stdout) == (75, "saved\n")


def test_a_wrong_key_ends_begin_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_pca.tools.cluster.job", "begin", "demo", "training.stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the nearest is training.steps" in done.stderr
    assert done.stderr.count("\n") == 1
