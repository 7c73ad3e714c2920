"""What a batch script asks before and after its ranks run: `python -m dist_pca.tools.cluster.job begin|end`."""

import os
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dist_pca.config import RunConfig
from dist_pca.console import print_error
from dist_pca.errors import UserError
from dist_pca.files import last_step
from dist_pca.options import Resume
from dist_pca.resilience.exit_status import ExitCode, ExitStatus, clear_exit_status, read_exit_status
from dist_pca.resources import resource
from dist_pca.tools.cluster.status import planned_steps, saved_step
from dist_pca.train import resolve_config
from dist_pca.training.run_folder import read_launch_log

FRUITLESS_STARTS = 3
"""Starts of a job in a row without a step saved, after which it is not started again."""
GAVE_UP = 1
"""Exit code of a job whose end was not recorded, or that made no progress."""

app = typer.Typer(add_completion=False)


class Verdict(NamedTuple):
    """What is to become of a job whose ranks have left."""

    code: int
    """`ExitCode.SAVED` where it should be started again."""
    message: str


def launcher(config: RunConfig, gpus: int) -> Path:
    """The launcher file for several nodes that suits a run.

    Args:
        config: The run.
        gpus: GPUs of each node; 0 runs on CPUs.
    """
    if gpus == 0:
        return resource("launch", "accelerate/multi_node_cpu")
    stages = {None: "", 2: "", 1: "_zero1", 3: "_zero3"}
    return resource("launch", f"accelerate/multi_node{stages[config.training.zero_stage]}")


def judge(folder: Path, *, job: str, restart: int, signalled: bool) -> Verdict:
    """See from a run folder how a start ended, and whether it should be followed by another.

    Args:
        folder: The run folder.
        job: SLURM's number of the job.
        restart: How often SLURM has started the job again.
        signalled: Whether the job was asked to stop: ranks that did not listen yet have then left without a word.
    """
    outcome, saved = read_exit_status(folder), saved_step(folder)
    if outcome is None:
        if 0 < planned_steps(folder) <= saved:
            return Verdict(ExitCode.DONE, f"{folder}: all {saved} steps are made")
        silence = f"ended without a word; see the logs in {folder / 'slurm'}"
        made = _last_step_of_start(folder, job, restart)
        if made > 0:
            # A node that is lost, or a signal that kills all ranks, leaves no rank to write exit.json.
            outcome = ExitStatus(ExitCode.LOST_RANK, f"{folder}: had made step {made}, and {silence}")
        elif signalled:
            outcome = ExitStatus(ExitCode.SAVED, f"{folder}: asked to stop before the first step")
        else:
            return Verdict(GAVE_UP, f"{folder}: {silence}")
    if outcome.code not in (ExitCode.SAVED, ExitCode.LOST_RANK):
        return Verdict(outcome.code, outcome.message)
    fruitful = [start.restart for start in read_launch_log(folder) if start.job == job and start.step < saved]
    fruitless = restart - max(fruitful, default=-1)
    if fruitless >= FRUITLESS_STARTS:
        return Verdict(
            GAVE_UP, f"{outcome.message}; not started again: the last {fruitless} starts have saved no further step"
        )
    return Verdict(ExitCode.SAVED, outcome.message)


def _last_step_of_start(folder: Path, job: str, restart: int) -> int:
    """Last step that this start of a job has logged or saved; 0 if it has made none."""
    launches = read_launch_log(folder)
    if not launches or (launches[-1].job, launches[-1].restart) != (job, restart):
        return 0
    step = max(saved_step(folder), last_step(folder / "metrics.jsonl"))
    return step if step > launches[-1].step else 0


@app.command("begin")
def _begin(
    config: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    gpus: int = 0,
    resume: Resume = None,
) -> None:
    """Forget how the last start ended, and print the run folder and the launcher file."""
    run = resolve_config(config, overrides or [])
    clear_exit_status(run.folder)
    typer.echo(f"{run.folder}\n{launcher(run, gpus)}")


@app.command("end")
def _end(folder: Path, signalled: Annotated[bool, typer.Option("--signalled")] = False) -> None:
    """Say how the start ended, and leave with 75 if it should be followed by another."""
    verdict = judge(
        folder,
        job=os.environ["SLURM_JOB_ID"],
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        signalled=signalled,
    )
    typer.echo(verdict.message)
    sys.exit(verdict.code)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print_error(str(error))
        sys.exit(UserError.EXIT_CODE)
