"""Jobs on a real cluster: two nodes, two processes, CPUs."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dist_pca.config import load_config
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.tools.cluster.status import read_status, saved_step
from dist_pca.training.run_folder import read_launch_log
from tests.support.raw_data import make_folder
from tests.support.runs import overrides
from tests.support.slurm import Cluster, wait_until
from tests.tools.cluster.test_scripts import LINES

STEPS = 12
TRAIN = resource("launch", "slurm/train", ".sbatch")
pytestmark = pytest.mark.slow


def arguments(streets: Path, name: str) -> list[str]:
    return ["demo", *overrides(streets, name, f"training.steps={STEPS}", "training.checkpoint_every=5")]


def train(cluster: Cluster, streets: Path, name: str) -> str:
    """The job's number."""
    size = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", f"--output=%x-{name}.out")
    return cluster.call("sbatch", "--parsable", *size, TRAIN, *arguments(streets, name))


def steps_told(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").is_file() else 0


@contextmanager
def frozen_in_mid_run(cluster: Cluster, job: str, run: Path) -> Iterator[list[psutil.Process]]:
    """The job's ranks, stopped between its first steps and its last one."""
    wait_until(lambda: steps_told(run) >= 2, 120, lambda: str(cluster.job(job)))
    ranks = [process for process in cluster.processes(SLURM_JOB_ID=job) if "RANK" in process.environ()]
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    assert saved_step(run) < STEPS
    yield ranks
    for rank in ranks:
        if rank.is_running():
            rank.send_signal(signal.SIGCONT)


def has_pending(rank: psutil.Process, number: int) -> bool:
    status = Path(f"/proc/{rank.pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def assert_equal_end(run: Path, other: Path) -> None:
    for part in ("model", "optimizer"):
        ours, theirs = (load_file(f / f"checkpoints/step-{STEPS:08d}/{part}.safetensors") for f in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, streets: Path) -> Path:
    job = train(cluster, streets, "unbroken")
    cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT")
    return streets / "runs" / "unbroken"


def test_two_nodes_train_to_the_end(unbroken: Path) -> None:
    (start,) = read_launch_log(unbroken)
    assert (start.step, start.world_size, start.restart) == (0, 2, 0)
    logs = sorted(path.name.split("-")[1] for path in (unbroken / "slurm").glob("*.log"))
    assert logs == ["0", "1"]
    status = read_status(unbroken)
    assert (status.state, status.step, status.restarts) == ("finished", STEPS, 0)
    outcome = read_exit_status(unbroken)
    assert outcome is not None
    assert outcome.code == ExitCode.DONE


def test_a_job_submitted_from_within_another_follows_nothing_of_that_one(cluster: Cluster, streets: Path) -> None:
    size = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1", "--time=30", "--output=inner.out")
    inherited = {"SLURM_MEM_PER_CPU": "1000", "SLURM_CPU_BIND": "verbose,mask_cpu:0x1", "SLURM_TRES_PER_TASK": "cpu:9"}
    inherited |= {"SLURM_GPUS": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3"}
    job = cluster.call("sbatch", "--parsable", *size, TRAIN, *arguments(streets, "inner"), **inherited)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT")["JobState"] == "COMPLETED", (
        cluster.folder / "inner.out"
    ).read_text()
    (start,) = read_launch_log(streets / "runs" / "inner")
    assert start.world_size == 2


@pytest.mark.exhaustive
def test_a_job_that_runs_out_of_time_saves_is_requeued_and_finishes(
    cluster: Cluster, streets: Path, unbroken: Path
) -> None:
    run = streets / "runs" / "hurried"
    job = train(cluster, streets, "hurried")
    with frozen_in_mid_run(cluster, job, run) as ranks:
        # The script wants its signal five minutes before the end, and SLURM looks every half a minute.
        cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=6")
        wait_until(lambda: any(has_pending(rank, signal.SIGTERM) for rank in ranks), 60)
        cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        told = steps_told(run)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT")["JobState"] == "COMPLETED"
    first, second = read_launch_log(run)
    assert (first.job, first.restart, second.job, second.restart) == (job, 0, job, 1)
    assert told <= second.step < STEPS
    assert_equal_end(run, unbroken)


@pytest.mark.exhaustive
def test_a_job_that_is_requeued_in_mid_run_loses_no_step(cluster: Cluster, streets: Path, unbroken: Path) -> None:
    run = streets / "runs" / "requeued"
    size = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-node", "1", "--time", "30")
    cluster.call("dist-pca", "submit", *arguments(streets, "requeued"), *size)
    (script,) = (run / "slurm").glob("*.sbatch")
    job = script.stem
    with frozen_in_mid_run(cluster, job, run):
        told = steps_told(run)
        cluster.call("scontrol", "requeue", job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    first, second = read_launch_log(run)
    assert (first.restart, second.restart) == (0, 1)
    assert told <= second.step < STEPS
    assert_equal_end(run, unbroken)


@pytest.mark.parametrize("fault", [Cluster.kill_daemon, pytest.param(Cluster.cut_power, marks=pytest.mark.exhaustive)])
def test_a_job_that_loses_a_node_goes_on_from_its_newest_checkpoint(
    cluster: Cluster, streets: Path, unbroken: Path, fault: Callable[[Cluster, str], None]
) -> None:
    run = streets / "runs" / fault.__name__
    job = train(cluster, streets, fault.__name__)
    with frozen_in_mid_run(cluster, job, run):
        fault(cluster, "n2")
        wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING", 60)
    cluster.start_node("n2")
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "NODE_FAIL")["JobState"] == "COMPLETED"
    assert len(read_launch_log(run)) == 2
    assert_equal_end(run, unbroken)


@pytest.mark.exhaustive
def test_a_killed_rank_ends_the_others_and_the_job_is_started_again(
    cluster: Cluster, streets: Path, unbroken: Path
) -> None:
    run = streets / "runs" / "killed"
    job = train(cluster, streets, "killed")
    with frozen_in_mid_run(cluster, job, run) as ranks:
        for rank in ranks:
            if rank.environ()["RANK"] == "1":
                rank.kill()
    # Long before the stall time-out of five minutes.
    wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING", 60, lambda: str(cluster.job(job)))
    assert "rank 1 (" in (cluster.folder / "dist-pca-killed.out").read_text()
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert_equal_end(run, unbroken)


@pytest.mark.exhaustive
def test_an_interrupted_job_saves_and_is_not_requeued(cluster: Cluster, streets: Path) -> None:
    run = streets / "runs" / "interrupted"
    job = train(cluster, streets, "interrupted")
    with frozen_in_mid_run(cluster, job, run):
        cluster.call("scancel", "--signal=INT", job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == f"{ExitCode.INTERRUPTED}:0"
    assert read_status(run).state == "stopped"
    assert 0 < saved_step(run) < STEPS


def test_parts_and_their_merge_are_one_build(cluster: Cluster, tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=7)
    build_shards("folder", tmp_path / "raw", tmp_path / "one", samples_per_shard=2, workers=1)
    build = ("folder", "--root", tmp_path / "raw", "--out", tmp_path / "parts", "--samples-per-shard", 2)
    script = resource("launch", "slurm/build_shards", ".sbatch")
    said = cluster.call("bash", script, *build, TASKS="3", SBATCH_TIMELIMIT="5").splitlines()[-1]
    parts, merge = said.split()[-1].split(",")
    assert cluster.wait_for(merge, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED"
    assert cluster.call("squeue", "--noheader", "--job", parts) == ""
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("parts", "one"))
    assert ours == theirs


@pytest.mark.parametrize("line", [line for line in LINES if "sbatch " in line and "bash launch" not in line])
def test_sbatch_knows_the_options_of_a_command_line_in_a_header(cluster: Cluster, line: str) -> None:
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    (place,) = (place for place, word in enumerate(words) if word.endswith(".sbatch"))
    script = resource("launch", f"slurm/{Path(words[place]).stem}", ".sbatch")
    command = [*words[:1], "--test-only", "--gpus-per-node=0", *words[1:place], str(script), *words[place + 1 :]]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    # The cluster is small, and has run no such job.
    known = "to start at|Requested node configuration is not available|dependency"
    assert re.search(known, done.stderr), done.stderr


@pytest.mark.exhaustive
def test_evaluating_in_a_job_gives_the_same_scores(cluster: Cluster, streets: Path, unbroken: Path) -> None:
    arguments = (str(unbroken), "--shards", streets / "dusk", "--json")
    script = resource("launch", "slurm/evaluate", ".sbatch")
    job = cluster.call(
        *("sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--output=evaluate.out"),
        *(script, *arguments),
    )
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    said = (cluster.folder / "evaluate.out").read_text()
    scores = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert scores == json.loads(cluster.call("dist-pca", "evaluate", *arguments))


@pytest.mark.exhaustive
def test_a_sweep_trains_each_pair_in_a_run_of_its_own(cluster: Cluster, streets: Path) -> None:
    # Tasks 2 and 3 are the last seed of the first overrides, and the first one of the second.
    options = ("--array=2-3", "--gpus-per-node=0", "--cpus-per-task=1", "--output=sweep-%a.out")
    script = resource("launch", "slurm/sweep", ".sbatch")
    settings = [key for key in arguments(streets, "") if not key.startswith(("name=", "training.steps="))]
    job = cluster.call("sbatch", "--parsable", *options, script, *settings, "training.steps=2", TRAIN=str(TRAIN))
    wait_until(lambda: not cluster.call("squeue", "--noheader", "--job", job), 180)
    found = {run: load_config(streets / "runs" / run / "config.yaml") for run in ("demo-0-seed2", "demo-1-seed0")}
    assert [config.seed for config in found.values()] == [2, 0]
    assert [config.objective.adapt for config in found.values()] == [False, True]
    assert [config.objective.association.scope for config in found.values()] == ["world", "rank"]
    assert {read_status(streets / "runs" / run).state for run in found} == {"finished"}
