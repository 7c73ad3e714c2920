"""The `accelerate launch` line of a run."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import yaml

from dist_pca.cores import usable_cores
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training.outcome import SUPERVISED, ExitCode, forget_outcome, read_outcome
from dist_pca.training.signals import SIGNALS

SHUTDOWN_SECONDS = 600
"""Time the launcher gives its ranks to save after a SIGTERM of its own; it would be 30."""


def launch_command(
    config: str,
    overrides: Sequence[str] = (),
    *,
    launcher: str | None = None,
    processes: int | None = None,
    zero_stage: int | None = None,
    resume: bool | None = None,
) -> list[str]:
    """The command that trains a run under `accelerate launch`.

    Args:
        config: A YAML file or a shipped config's name.
        overrides: `key=value`s.
        launcher: A YAML file for accelerate or a shipped one's name; None takes one process per GPU, or two on the CPU.
        processes: Processes on this machine; None takes the launcher file's.
        zero_stage: The config's ZeRO stage, which a launcher chosen here is for.
        resume: None goes on with the same run; True also where keys differ; False refuses a folder that holds a run.

    Raises:
        UserError: there is no such shipped launcher.
    """
    if launcher is None:
        launcher = f"accelerate/gpu_zero{zero_stage or 2}" if torch.cuda.is_available() else "accelerate/cpu"
        processes = processes or torch.cuda.device_count() or None
    file = Path(launcher) if Path(launcher).is_file() else resource("launch", launcher)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
        *(("--num_processes", str(processes)) if processes else ()),
        *("-m", "dist_pca.train", config, *overrides),
        *(() if resume is None else ("--resume",) if resume else ("--no-resume",)),
    ]


def process_count(command: Sequence[str]) -> int:
    """Processes that a launch command starts, on all machines together.

    Raises:
        UserError: neither the command nor its launcher file says so.
    """
    if "--num_processes" in command:
        return int(command[command.index("--num_processes") + 1])
    file = Path(command[command.index("--config_file") + 1])
    try:
        return int(yaml.safe_load(file.read_text())["num_processes"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"launcher {file}: has no num_processes; write one, or give --processes") from error


def launch(command: Sequence[str], folder: Path) -> int:
    """Run a launch command to its end, and give the exit code of the run as `outcome.ExitCode` has it.

    SIGINT, SIGTERM, SIGUSR1 or SIGHUP to this process makes the ranks save and leave; the launcher between them, which
    would die of SIGUSR1 and kill ranks that save for longer than half a minute, hears nothing. A second one ends all.

    Args:
        command: What `launch_command` gave.
        folder: The run folder, where the ranks write how the run ended.
    """
    forget_outcome(folder)
    # Without the first ones the launcher warns that it sets or found them itself.
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // process_count(command)))}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)} | os.environ | {SUPERVISED: "1"}
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        members = psutil.Process(process.pid).children(recursive=True)
        ranks = [member for member in members if _is_rank(member, process.pid)]
        # SIGUSR1 is ignored by a rank that does not listen yet.
        passed_on = number if number == signal.SIGINT else signal.SIGTERM
        for rank in ranks if len(received) == 1 else members:
            with suppress(psutil.Error):
                rank.send_signal(passed_on) if len(received) == 1 else rank.kill()
        if len(received) > 1 or not ranks:
            process.kill()

    # `nohup` and shells' background jobs want theirs ignored.
    numbers = [n for n in (*SIGNALS, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    # What is ignored stays so in the launcher: SLURM may signal every process of a job, it too.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        # In a session of its own: Ctrl-C reaches this process alone.
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:
            for number in numbers:
                signal.signal(number, forward)
            code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    outcome = read_outcome(folder)
    if outcome is not None:
        return outcome.code
    if len(received) == 1:
        # No rank was there yet, so nothing is lost.
        return ExitCode.INTERRUPTED if received[0] == signal.SIGINT else ExitCode.SAVED
    if received:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


def _is_rank(process: psutil.Process, launcher: int) -> bool:
    with suppress(psutil.Error):
        return process.ppid() == launcher and "RANK" in process.environ()
    return False


def shown(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(["accelerate", "launch", *command[3:]])
