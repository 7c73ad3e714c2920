"""The `accelerate launch` line of a run."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from dist_pca.errors import UserError
from dist_pca.resources import resource


def launch_command(
    config: str,
    overrides: Sequence[str] = (),
    *,
    launcher: str | None = None,
    processes: int | None = None,
    resume: bool = False,
) -> list[str]:
    """The command that trains a run under `accelerate launch`.

    Args:
        config: A YAML file or a shipped config's name.
        overrides: `key=value`s.
        launcher: A YAML file for accelerate or a shipped one's name; None takes one process per GPU, or two on the CPU.
        processes: Processes on this machine; None takes the launcher file's.
        resume: Go on from the newest checkpoint.

    Raises:
        UserError: there is no such shipped launcher.
    """
    if launcher is None:
        launcher = "accelerate/gpu_zero2" if torch.cuda.is_available() else "accelerate/cpu"
        processes = processes or torch.cuda.device_count() or None
    file = Path(launcher) if Path(launcher).is_file() else resource("launch", launcher)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
        *(("--num_processes", str(processes)) if processes else ()),
        *("-m", "dist_pca.train", config, *overrides),
        *(("--resume",) if resume else ()),
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


def launch(command: Sequence[str]) -> int:
    """Run a launch command to its end and give its exit code; Ctrl-C reaches the ranks, which are waited for."""
    # Without these the launcher warns that it sets or found them itself.
    quiet = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // process_count(command)))}
    if not torch.cuda.is_available():
        quiet["DS_ACCELERATOR"] = "cpu"
    with subprocess.Popen(command, env=quiet | os.environ) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()


def shown(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(["accelerate", "launch", *command[3:]])
