"""Launching a run: its `accelerate launch` command, signals, and exit code."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import yaml

from dist_pca.console import erase_live_view
from dist_pca.cores import usable_cores
from dist_pca.distributed import check_gpus
from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import SUPERVISED, ExitCode, clear_exit_status, read_exit_status
from dist_pca.resilience.launcher_settings import check_launcher_file
from dist_pca.resilience.preemption import SIGNALS
from dist_pca.resources import resource

_PR_SET_PDEATHSIG = 1
SHUTDOWN_SECONDS = 600
"""Time that the launcher leaves its ranks to save after its own SIGTERM; its default is 30."""


def launch_command(
    config: str,
    overrides: Sequence[str] = (),
    *,
    launcher: str | None = None,
    processes: int | None = None,
    zero_stage: int | None = None,
    resume: bool | None = None,
) -> list[str]:
    """Build the command that trains a run under `accelerate launch`.

    Args:
        config: A YAML file or a shipped config's name.
        overrides: `key=value`s.
        launcher: A YAML file for accelerate or a shipped one's name; None uses one process per GPU, or two on the CPU.
        processes: Processes on this machine; None uses the launcher file's.
        zero_stage: The config's ZeRO stage, for which the launcher is chosen if it is None.
        resume: None resumes the same run; True also one whose keys differ; False refuses a folder that holds a run.

    Raises:
        UserError: there is no such shipped launcher, or its file has a setting that would be without effect.
    """
    if launcher is None:
        launcher = f"accelerate/gpu_zero{zero_stage or 2}" if torch.cuda.is_available() else "accelerate/cpu"
        processes = processes or torch.cuda.device_count() or None
    file = Path(launcher) if Path(launcher).is_file() else resource("launch", launcher)
    check_launcher_file(file)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
        *(("--num_processes", str(processes)) if processes else ()),
        *("-m", "dist_pca.train", config, *overrides),
        *(() if resume is None else ("--resume",) if resume else ("--no-resume",)),
    ]


def process_count(command: Sequence[str]) -> int:
    """World size of a launch command, over all machines.

    Raises:
        UserError: neither the command nor its launcher file names it.
    """
    if "--num_processes" in command:
        return int(command[command.index("--num_processes") + 1])
    file = Path(command[command.index("--config_file") + 1])
    try:
        return int(yaml.safe_load(file.read_text())["num_processes"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"launcher {file}: has no num_processes; add it, or pass --processes") from error


def machine_count(command: Sequence[str]) -> int:
    """Number of machines of a launch command, from its launcher file; 1 if that names none."""
    content = yaml.safe_load(Path(command[command.index("--config_file") + 1]).read_text()) or {}
    return max(1, int(content.get("num_machines") or 1))


def launch(command: Sequence[str], folder: Path) -> int:
    """Run a launch command, and return the run's exit code, as `exit_status.ExitCode` lists them.

    On SIGINT, SIGTERM, SIGUSR1 or SIGHUP the ranks save and exit. The signal is not forwarded to the launcher between
    them, which would die of SIGUSR1 and kill ranks that save for longer than half a minute. A second one kills all. If
    this process is killed, the ranks save and exit too.

    Args:
        command: Built by `launch_command`.
        folder: The run folder, where the ranks write their exit status.

    Raises:
        UserError: this machine has fewer GPUs than processes, or the last exit status cannot be removed.
    """
    if torch.cuda.is_available():
        check_gpus(max(1, process_count(command) // machine_count(command)))
    try:
        clear_exit_status(folder)
    except OSError as error:
        raise UserError(f"{folder}/exit.json: cannot be removed ({error}); fix that and start the run again") from error
    # The launcher warns about those that it would have to set itself.
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // process_count(command)))}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)} | os.environ | {SUPERVISED: "1"}
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        members = psutil.Process(process.pid).children(recursive=True)
        ranks = [member for member in members if _is_rank(member, process.pid)]
        # A rank that has not installed its handlers yet ignores SIGUSR1.
        forwarded = number if number == signal.SIGINT else signal.SIGTERM
        for rank in ranks if len(received) == 1 else members:
            with suppress(psutil.Error):
                rank.send_signal(forwarded) if len(received) == 1 else rank.kill()
        if len(received) > 1 or not ranks:
            process.kill()

    # `nohup` and shells' background jobs have some ignored.
    numbers = [n for n in (*SIGNALS, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    # The launcher inherits that they are ignored: SLURM may signal it too, as every process of a job.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        # In a new session, so that Ctrl-C reaches this process alone.
        with subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent) as process:
            for number in numbers:
                signal.signal(number, forward)
            code = _wait(process, folder)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # A rank that was killed has left it.
        erase_live_view()
    status = read_exit_status(folder)
    if status is not None:
        return status.code
    if len(received) == 1:
        # The ranks had not joined yet, so nothing is lost.
        return ExitCode.INTERRUPTED if received[0] == signal.SIGINT else ExitCode.SAVED
    if received:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


def _wait(process: "subprocess.Popen[bytes]", folder: Path) -> int:
    """Wait for the launcher, which would wait long for a stopped rank once another has ended the run."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        if read_exit_status(folder) is not None:
            with suppress(psutil.Error):
                for member in psutil.Process(process.pid).children(recursive=True):
                    if member.status() == psutil.STATUS_STOPPED:
                        member.kill()


def _end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies, of `kill -9` too; on Linux alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_rank(process: psutil.Process, launcher: int) -> bool:
    with suppress(psutil.Error):
        return process.ppid() == launcher and "RANK" in process.environ()
    return False


def quote_command(command: Sequence[str]) -> str:
    """Quote a launch command as a person would type it."""
    return shlex.join(["accelerate", "launch", *command[3:]])
