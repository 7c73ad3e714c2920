"""Filling in the batch script of a run, and handing it to SLURM."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dist_pca.config import RunConfig
from dist_pca.errors import UserError

LEAST_SECONDS = 600
"""Shortest time of a job: the last five minutes are for saving."""
_DIRECTIVE = re.compile(r"#SBATCH --([\w-]+)(?:=(.*))?")
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
"""Options of sbatch that ask for GPUs."""
_GPU_DIRECTIVE = re.compile(r"#SBATCH\s+(--gres[= ](\S*,)?(gres[:/])?gpu\b|--gpus(-per-node|-per-task)?[= ]|-G)")
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d\d))?(?::(\d\d))?")
_CLOCK = re.compile(r"()(?:(\d+):)?(\d+):(\d\d)")
_MINUTES = re.compile(r"()()(\d+)()")


def parse_time(written: str) -> int:
    """Seconds of a time limit in SLURM's notation: minutes, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS.

    Raises:
        UserError: it is none of these, or too short for a run to save in.
    """
    found = _DAYS.fullmatch(written) or _CLOCK.fullmatch(written) or _MINUTES.fullmatch(written)
    if found is None:
        raise UserError(f"--time {written}: write minutes, [D-]HH:MM:SS or D-HH, for example 12:00:00")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    seconds = ((24 * days + hours) * 60 + minutes) * 60 + rest
    if seconds < LEAST_SECONDS:
        raise UserError(
            f"--time {written}: too short to start, train and save in; give at least {LEAST_SECONDS // 60} minutes"
        )
    return seconds


def render(script: str, directives: Mapping[str, str | None], arguments: Sequence[str], python: str | None) -> str:
    """A batch script with values filled in, which needs no arguments any more.

    Args:
        script: The text of one in `launch/slurm/`, or of a copy made for a site.
        directives: Options of sbatch by name, without dashes. A value replaces the script's; "" is an option that has
            none; None takes it out.
        arguments: The script's arguments.
        python: Interpreter to take the place of `python`; None leaves the script's.

    Raises:
        UserError: it has no #SBATCH lines, or an option holds a line break.
    """
    lines = script.splitlines()
    if any(name in GPU_OPTIONS for name in directives):
        # Two directives for GPUs fail where they differ.
        lines = [line for line in lines if not _GPU_DIRECTIVE.match(line) or _option(line) in directives]
    places = [place for place, line in enumerate(lines) if line.startswith("#SBATCH")]
    if not places:
        raise UserError("--script: holds no #SBATCH line; start from launch/slurm/train.sbatch")
    left = dict(directives)
    for name, value in left.items():
        if "\n" in f"{name}{value}":
            raise UserError(f"--{name}: an option of sbatch cannot hold a line break")
    filled: list[str] = []
    for place, line in enumerate(lines):
        option = _option(line)
        if option is not None and option in directives:
            if (value := left.pop(option, None)) is not None:
                filled.append(_directive(option, value))
        elif line == "PYTHON=(python)" and python is not None:
            filled.append(f"PYTHON=({shlex.quote(python)})")
        else:
            filled.append(line)
        if place == places[-1]:
            filled += [_directive(name, value) for name, value in left.items() if value is not None]
            filled.append(f"set -- {shlex.join(arguments)}")
    return "\n".join(filled) + "\n"


def check_run(config: RunConfig, *, world_size: int, gpus: bool, resume: bool | None) -> None:
    """See before a job is queued whether the run could be started: data, classes, sizes, network, folder.

    Pretrained weights are fetched for it, so that compute nodes find them.

    Args:
        config: The run.
        world_size: Processes of the job.
        gpus: Whether it runs on GPUs.
        resume: As `check_resume` takes it.

    Raises:
        UserError: something does not fit.
    """
    import torch

    from dist_pca.training.accumulation import fit_batches
    from dist_pca.training.prepare import prepare_run
    from dist_pca.training.run_folder import check_resume

    check_resume(fit_batches(config, world_size), resume)
    if gpus and not torch.cuda.is_available() and config.training.precision == "fp16":
        # The machine that jobs are submitted on need not be able to do what theirs can.
        training = config.training.model_copy(update={"precision": "fp32"})
        config = config.model_copy(update={"training": training})
    prepare_run(config, world_size=world_size, resume=True)


def submit(script: str, folder: Path) -> str:
    """Hand a batch script to SLURM, and keep it as `slurm/JOB.sbatch` in the run folder, where its logs go too.

    Returns:
        SLURM's number of the job.

    Raises:
        UserError: there is no SLURM here, or it refuses the job; then nothing is left.
    """
    logs = folder / "slurm"
    # The job's output goes there as soon as it begins, which may be at once.
    made = [path for path in (logs, *logs.parents) if not path.exists()]
    logs.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            capture_output=True,
            text=True,
            check=False,
            env=outside_jobs(os.environ),
        )
        refusal = " ".join(done.stderr.split()) if done.returncode != 0 else ""
    except FileNotFoundError:
        refusal = "no such command here; submit on a machine of the cluster, or see the script with --dry-run"
    if refusal:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise UserError(f"sbatch: {refusal.removeprefix('sbatch: error: ')}")
    # With several clusters, sbatch prints the cluster's name too.
    job = done.stdout.strip().split(";")[0]
    (logs / f"{job}.sbatch").write_text(script)
    return job


def outside_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out of an environment what SLURM has set for the job in which this process may run.

    Jobs inherit the environment from which they are submitted, and memory limits, bindings and GPUs of another job
    contradict their own.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in environment.items() if name in kept or not name.startswith("SLURM_")}


def train_directives(
    *,
    name: str,
    folder: Path,
    nodes: int,
    gpus_per_node: int,
    cpus_per_node: int,
    time: str,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    further: Sequence[str] = (),
) -> dict[str, str | None]:
    """Options of sbatch for a training job.

    Args:
        name: Of the run.
        folder: The run folder.
        nodes: Nodes.
        gpus_per_node: GPUs of each; 0 trains on CPUs, one process on each node.
        cpus_per_node: Cores of each.
        time: In SLURM's notation.
        partition: Or the cluster's own.
        account: Or the user's own.
        qos: Or the account's own.
        further: Any others, as `key` or `key=value`.

    Raises:
        UserError: the time is none, or too short, or `further` asks for another number of GPUs.
    """
    parse_time(time)
    chosen = {"partition": partition, "account": account, "qos": qos}
    others = {key: value for key, _, value in (option.removeprefix("--").partition("=") for option in further)}
    for key, value in others.items():
        wanted = gpus_asked_for(key, value, nodes)
        if wanted is not None and wanted != gpus_per_node:
            raise UserError(
                f"--sbatch {key}={value}: asks for {wanted:g} GPUs on each node, and --gpus-per-node for "
                f"{gpus_per_node}; make them equal"
            )
    by_hand = any(gpus_asked_for(key, value, nodes) is not None for key, value in others.items())
    return {
        "job-name": name,
        "output": f"{folder}/slurm/%j.out",
        "nodes": str(nodes),
        "gpus-per-node": str(gpus_per_node) if gpus_per_node and not by_hand else None,
        "cpus-per-task": str(cpus_per_node),
        "time": time,
        **{key: value for key, value in chosen.items() if value is not None},
        **others,
    }


def gpus_asked_for(option: str, value: str, nodes: int) -> float | None:
    """GPUs that an option of sbatch asks for on each node; None if it asks for none.

    Args:
        option: Its name, without dashes.
        value: Its value, such as `gpu:a100:8` of `gres` or `a100:8` of `gpus-per-node`.
        nodes: Nodes of the job, each with one task.
    """
    parts = [part.removeprefix("gres:").removeprefix("gres/") for part in value.split(",")]
    if option == "gres":
        parts = [part.partition(":")[2] for part in parts if re.fullmatch(r"gpu(:.*)?", part)]
    elif option not in GPU_OPTIONS:
        return None
    counts = [int(last) if (last := part.rpartition(":")[2]).isdecimal() else 1 for part in parts]
    return (sum(counts) / (nodes if option == "gpus" else 1)) if counts else None


def _option(line: str) -> str | None:
    found = _DIRECTIVE.fullmatch(line)
    return None if found is None else found[1]


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"
