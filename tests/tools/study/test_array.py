import csv
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_pca.cli import app
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.tools.study.array import array_script, pending_runs, scoring_script
from dist_pca.tools.study.design import Variant
from dist_pca.training.run_folder import read_launch_log
from tests.support.runs import build_streets
from tests.support.slurm import Cluster, fake_sbatch, missing_programs, running_cluster, wait_until
from tests.tools.study.studies import scores_of, small_study, write_finished
from tests.tools.study.test_study import lines, study_line

SCRIPT = resource("launch", "slurm/train", ".sbatch").read_text()
DIRECTIVES = {"job-name": "mine", "nodes": "2", "time": "60", "gpus-per-node": None}


def test_each_task_gets_the_arguments_of_its_run(tmp_path: Path) -> None:
    study = small_study(tmp_path, variants=[Variant("a", ("data.classes=[road, sky]",)), Variant("b", ())])
    text = array_script(study, [1, 4], SCRIPT, DIRECTIVES, at_once=3, python=sys.executable)
    assert "#SBATCH --array=1,4%3\n" in text
    assert f"#SBATCH --output={tmp_path}/out/slurm/%A_%a.out\n" in text
    assert f"PYTHON=({sys.executable})" in text
    # What the script does with its arguments comes after the choice, so this prints them in the place of all that.
    chosen = text[: text.index("set -eo pipefail")] + 'printf "%s\\n" "$@"\n'
    for place in (1, 4):
        done = subprocess.run(
            ["bash", "-s"],
            input=chosen,
            env={"SLURM_ARRAY_TASK_ID": str(place)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == ["demo", *study.runs[place].overrides]


def test_the_tasks_are_the_runs_that_have_steps_left(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    write_finished(study, study.runs[2], scores_of((0.1, 0.2, 0.3)))
    assert pending_runs(study) == [0, 1, 3, 4, 5]


def test_scores_are_made_when_the_array_has_ended_whatever_became_of_it(tmp_path: Path) -> None:
    text = scoring_script(tmp_path / "study.yaml", DIRECTIVES, "12")
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH --nodes=1\n")
    assert "#SBATCH --dependency=afterany:12\n" in text
    assert "#SBATCH --job-name=mine-scores\n" in text
    assert "--array" not in text
    assert text.endswith(f"exec {sys.executable} -m dist_pca.cli study {tmp_path}/study.yaml --collect\n")


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    build_streets(folder)
    return folder


def test_an_array_and_the_job_after_it_are_submitted(
    streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f"cat >> {tmp_path}/got; echo $(wc -l < {tmp_path}/got)")
    line = study_line(streets, str(tmp_path / "out"))[3:]
    wanted = ["--slurm", "--gpus-per-node", "0", "--time", "60", "--sbatch", "constraint=a100"]
    dry = CliRunner().invoke(app, [*line, *wanted, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "afterany:JOB" in dry.stdout
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*line, *wanted])
    assert done.exit_code == 0, done.output
    first, second = sorted((tmp_path / "out/slurm").glob("*.sbatch"), key=lambda path: int(path.stem))
    assert (tmp_path / "got").read_text() == first.read_text() + second.read_text()
    assert "#SBATCH --array=0,1\n" in first.read_text()
    assert f"#SBATCH --dependency=afterany:{first.stem}\n" in second.read_text()
    for script in (first, second):
        assert "#SBATCH --constraint=a100\n" in script.read_text()
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert (tmp_path / "out/study.yaml").is_file()


def test_a_sites_own_script_leaves_scoring_to_the_user(
    streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 7")
    (tmp_path / "own.sbatch").write_text(SCRIPT.replace("PYTHON=(python)", "PYTHON=(container python)"))
    line = study_line(streets, str(tmp_path / "out"))[3:]
    wanted = ["--slurm", "--gpus-per-node", "0", "--time", "60", "--script", str(tmp_path / "own.sbatch")]
    done = CliRunner().invoke(app, [*line, *wanted])
    assert done.exit_code == 0, done.output
    (script,) = (tmp_path / "out/slurm").iterdir()
    assert "PYTHON=(container python)" in script.read_text()
    assert done.stdout.endswith(f"dist-pca study {tmp_path}/out/study.yaml --collect\n")


def test_slurm_needs_to_know_how_much_and_how_long(streets: Path, tmp_path: Path) -> None:
    line = study_line(streets, str(tmp_path / "out"))[3:]
    done = CliRunner().invoke(app, [*line, "--slurm"])
    assert isinstance(done.exception, UserError)
    assert "--gpus-per-node and --time" in str(done.exception)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(missing)
    with running_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_an_arrays_runs_are_trained_requeued_one_by_one_and_scored(cluster: Cluster, streets: Path) -> None:
    out = streets / "out"
    line = [*study_line(streets, str(out))[3:], "--set", "training.steps=12"]
    wanted = ["--slurm", "--gpus-per-node", "0", "--cpus-per-node", "1", "--time", "30"]
    cluster.call("dist-pca", *line, *wanted)
    array, scores = sorted(path.stem for path in (out / "slurm").glob("*.sbatch"))
    runs = [out / "runs" / f"demo-seed{seed}" for seed in (0, 1)]
    wait_until(
        lambda: all(lines(run / "metrics.jsonl") > 0 for run in runs), 240, lambda: cluster.call("squeue", "--array")
    )
    # The task that bears the number of the whole array is the one that SLURM asks to stop.
    (last,) = [run for run in runs if read_launch_log(run)[0].job == array]
    other = runs[1 - runs.index(last)]
    ranks = [p for p in cluster.processes(SLURM_JOB_ID=str(read_launch_log(other)[0].job)) if "RANK" in p.environ()]
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_{runs.index(last)}")
    wait_until(lambda: len(read_launch_log(last)) == 2, 240, lambda: cluster.call("squeue", "--array"))
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    cluster.wait_for(scores, "COMPLETED", "FAILED", seconds=400)
    assert [len(read_launch_log(run)) for run in (last, other)] == [2, 1]
    with (out / "study.csv").open() as file:
        assert [(row["seed"], row["step"]) for row in csv.DictReader(file)] == [("0", "12"), ("1", "12")]
    assert cluster.job(scores)["JobState"] == "COMPLETED"
