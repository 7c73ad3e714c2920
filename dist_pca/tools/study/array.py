"""A study under SLURM: an array that trains its runs, and a job after it that scores them."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_pca.tools.cluster.submit import check_run, render, submit
from dist_pca.tools.study.design import Study
from dist_pca.tools.study.training import refuse_changed_settings
from dist_pca.training.run_folder import is_finished

_ARGUMENTS = "set -- study"
"""Line of the batch script in whose place each task of the array gets the arguments of its run."""


def pending_runs(study: Study) -> list[int]:
    """Places, in `study.runs`, of those that have not made all steps."""
    return [place for place, run in enumerate(study.runs) if not is_finished(study.resolve(run))]


def array_script(
    study: Study,
    pending: Sequence[int],
    script: str,
    directives: Mapping[str, str | None],
    *,
    at_once: int | None,
    python: str | None,
) -> str:
    """The batch script of an array whose task n trains run n of the study.

    Args:
        study: The study.
        pending: Places of the runs in `study.runs`.
        script: The text of `launch/slurm/train.sbatch`, or of a copy made for a site.
        directives: As `train_directives` gives them.
        at_once: Most tasks that run at the same time; None leaves it to SLURM.
        python: As `render` takes it.

    Raises:
        UserError: as `render` does.
    """
    tasks = ",".join(map(str, pending)) + (f"%{at_once}" if at_once else "")
    logs = {"output": f"{study.out}/slurm/%A_%a.out", "array": tasks}
    text = render(script, {**directives, **logs}, ["study"], python)
    cases = [f"  {place}) set -- {shlex.join([study.config, *study.runs[place].overrides])} ;;" for place in pending]
    choice = "\n".join(("case $SLURM_ARRAY_TASK_ID in", *cases, "esac"))
    return text.replace(f"{_ARGUMENTS}\n", f"{choice}\n", 1)


def scoring_script(study_file: Path, directives: Mapping[str, str | None], after: str) -> str:
    """The batch script of the job that scores an array's runs on one node and makes the table.

    Args:
        study_file: The saved design.
        directives: Those of the array.
        after: SLURM's number of the array.
    """
    name = f"{directives['job-name']}-scores"
    own = {"job-name": name, "nodes": "1", "array": None, "dependency": f"afterany:{after}"}
    command = shlex.join([sys.executable, "-m", "dist_pca.cli", "study", str(study_file), "--collect"])
    return render("#!/usr/bin/env bash\n#SBATCH --nodes=1", {**directives, **own}, [], None) + f"exec {command}\n"


def submit_study(
    study: Study,
    study_file: Path,
    script: str,
    directives: Mapping[str, str | None],
    *,
    own_script: bool,
    world_size: int,
    gpus: bool,
    at_once: int | None,
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    """Check the study, and queue an array of its runs and, after it, the job that scores them.

    A site's own script stands for modules and containers that are not known here, so its scoring is left to the user.

    Args:
        study: The study.
        study_file: Where its design is saved.
        script: Text of the batch script of one run.
        directives: As `train_directives` gives them.
        own_script: Whether the script is the user's own.
        world_size: Processes of each run.
        gpus: Whether it trains on GPUs.
        at_once: Most runs at the same time; None leaves it to SLURM.
        dry_run: Show the scripts and submit nothing.
        say: Prints a line for the reader.

    Raises:
        UserError: something does not fit, or SLURM refuses it.
    """
    refuse_changed_settings(study)
    for run in study.runs[: len(study.variants)]:
        check_run(study.resolve(run), world_size=world_size, gpus=gpus, resume=None)
    collecting = f"dist-pca study {study_file} --collect"
    pending = pending_runs(study)
    if not pending:
        say(f"all {len(study.runs)} runs are trained already; score them and make the table with\n  {collecting}")
        return
    python = None if own_script else sys.executable
    array = array_script(study, pending, script, directives, at_once=at_once, python=python)
    say(array)
    if dry_run:
        if not own_script:
            say(scoring_script(study_file, directives, "JOB"))
        return
    job = submit(array, study.out)
    say(f"job {job} is queued, an array of {len(pending)} runs; follow it with\n  dist-pca status {study.out}/runs/*")
    if own_script:
        say(f"when it has ended, score its runs and make the table on a machine of the cluster with\n  {collecting}")
    else:
        scores = submit(scoring_script(study_file, directives, job), study.out)
        say(f"job {scores} scores them and makes the table when the array has ended")
