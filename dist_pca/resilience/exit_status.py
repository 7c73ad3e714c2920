"""Exit codes of a run, and its exit status in `exit.json` in the run folder, which no launcher can replace.

Launchers turn every exit code of a rank into 1. The rank that finds why the run ends therefore writes it into the run
folder; `dist-pca train` exits with that code, and batch scripts can read the file.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import psutil
from pydantic import TypeAdapter

from dist_pca.console import erase_live_view
from dist_pca.errors import LostProcess, UserError
from dist_pca.files import read_record, write_record

SUPERVISED = "DIST_PCA_SUPERVISED"
"""Environment variable of ranks whose parent reads `exit.json`: they exit with 0, so that the launcher between them
reports no failure, and the parent exits with the file's code."""


class ExitCode(IntEnum):
    """Exit codes of `dist-pca train`."""

    DONE = 0
    """Trained to the last step."""
    REFUSED = UserError.EXIT_CODE
    """An error that the user can fix; the last line names it."""
    DIVERGED = 65
    """Too many steps in a row without a finite loss and gradient; see non_finite_step.json."""
    LOST_RANK = LostProcess.EXIT_CODE
    """A rank or one of its loader processes died or stalled; start the run again."""
    SAVED = 75
    """Stopped by a signal or the time limit, and saved; start the run again."""
    INTERRUPTED = 130
    """Ctrl-C, and saved."""


@dataclass(frozen=True)
class ExitStatus:
    """Content of `exit.json`."""

    code: int
    message: str


_STATUS = TypeAdapter(ExitStatus)


def clear_exit_status(folder: Path) -> None:
    """Remove the exit status of an earlier launch."""
    (folder / "exit.json").unlink(missing_ok=True)


def write_exit_status(folder: Path, code: int, message: str) -> None:
    """Write `exit.json` atomically; without a run folder, or on a full disk, there is only the exit code."""
    with suppress(OSError):
        write_record(folder / "exit.json", {"code": int(code), "message": message})


def read_exit_status(folder: Path) -> ExitStatus | None:
    """Exit status of the last launch; None if it ended without writing one."""
    if (folder / "exit.json").is_file():
        with suppress(UserError):
            return read_record(folder / "exit.json", _STATUS, "remove it")
    return None


def exit_process(folder: Path | None, code: int) -> NoReturn:
    """Exit at once and kill loader processes, without waiting for other ranks, which may be in a collective.

    Args:
        folder: The run folder; None outside of a run.
        code: The exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    erase_live_view()
    reported = folder is not None and SUPERVISED in os.environ and read_exit_status(folder) is not None
    os._exit(0 if reported else code)
