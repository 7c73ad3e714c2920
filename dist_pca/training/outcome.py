"""How a run ended: exit codes, and `exit.json` in the run folder, which a launcher cannot swallow.

Launchers turn every exit code of a rank into 1. So the rank that knows why the run ended writes it into the run folder;
`dist-pca train` exits with that code, and a batch script can decide from the file.
"""

import json
import os
import sys
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from dist_pca.errors import UserError

SUPERVISED = "DIST_PCA_SUPERVISED"
"""Environment variable of ranks whose parent reads `exit.json`: they leave with 0, so that the launcher between them
has no failure to report, and the parent's exit code is the file's."""


class ExitCode(IntEnum):
    """What the process ends with."""

    DONE = 0
    """Every step is made."""
    REFUSED = UserError.EXIT_CODE
    """Something the user can mend; the last line says what."""
    DIVERGED = 65
    """Too many steps in a row without a finite loss and gradient; see bad_step.json."""
    LOST_RANK = 69
    """Another rank died or stalled; start the run again."""
    SAVED = 75
    """Asked to stop or out of time, and saved; start the run again."""
    INTERRUPTED = 130
    """Ctrl-C, and saved."""


class Outcome(NamedTuple):
    """What `exit.json` holds."""

    code: int
    message: str


def forget_outcome(folder: Path) -> None:
    """Remove what an earlier start of the run left."""
    (folder / "exit.json").unlink(missing_ok=True)


def record_outcome(folder: Path, code: int, message: str) -> None:
    """Write `exit.json`, whole; without a run folder, or with a full disk, the exit code alone must do."""
    aside = folder / f".exit.json.{os.getpid()}.partial"
    try:
        aside.write_text(json.dumps({"code": int(code), "message": message}) + "\n")
        aside.replace(folder / "exit.json")
    except OSError:
        aside.unlink(missing_ok=True)


def read_outcome(folder: Path) -> Outcome | None:
    """What the run's last start ended with; None where nobody could say."""
    try:
        values = json.loads((folder / "exit.json").read_text())
        return Outcome(int(values["code"]), str(values["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def leave(folder: Path, code: int) -> NoReturn:
    """End this process and its loader processes at once: other ranks may wait for it in a collective."""
    sys.stderr.flush()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    os._exit(0 if SUPERVISED in os.environ and read_outcome(folder) is not None else code)


def say_error(message: str) -> None:
    """One red line on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", style="red", markup=False)
