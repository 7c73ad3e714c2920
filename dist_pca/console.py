"""The one way in which the package prints by rich: names of classes, runs and files appear as they are.

Rich would take `[red]` in a name for a style, and `:car:` for a picture. What is styled is therefore a rich `Text`.
Descriptions of progress bars are the exception: rich reads markup in them, so they hold no names.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO

from rich.console import Console

DEBUG = "DIST_PCA_DEBUG"
"""Environment variable of `--debug`, which ranks inherit."""
QUIET = "DIST_PCA_QUIET"
"""Environment variable of `--quiet`."""
ERASE_BELOW = "\r\x1b[J"
"""Moves a terminal's cursor to the start of its row, and erases that row and all below."""


def plain_console(
    *,
    stderr: bool = False,
    soft_wrap: bool = False,
    always: bool = False,
    file: IO[str] | None = None,
) -> Console:
    """Create a console that interprets nothing in strings.

    Args:
        stderr: Print to stderr and not to stdout.
        soft_wrap: Leave lines as long as they are; for messages, not for tables.
        always: Print to stderr with `dist-pca --quiet` too; for warnings and errors.
        file: Print to this file.
    """
    quiet = stderr and not always and QUIET in os.environ
    return Console(
        stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, file=file, markup=False, emoji=False, highlight=False
    )


def paths_in_common(paths: Sequence[str]) -> list[str]:
    """Shorten paths to where they differ: each as it is inside the folder that holds them all."""
    absolute = [Path(path).absolute() for path in paths]
    parent = os.path.commonpath([path.parent for path in absolute])
    return [os.path.relpath(path, parent) for path in absolute]


def counted(number: int, noun: str) -> str:
    """A number of things, for example `1 shard` and `1,200 shards`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def print_warning(message: str) -> None:
    """Print a warning as one yellow line on stderr."""
    plain_console(stderr=True, soft_wrap=True, always=True).print(f"warning: {message}", style="yellow")


def has_cursor(console: Console) -> bool:
    """Whether what a console prints is seen on a terminal whose cursor can be moved."""
    return not console.quiet and console.file.isatty() and not console.is_dumb_terminal


def erase_live_view() -> None:
    """Erase the live view that a run, maybe of another process, has drawn below the cursor of stderr's terminal."""
    console = plain_console(stderr=True)
    if has_cursor(console):
        console.file.write(ERASE_BELOW)
        console.file.flush()


def duration(seconds: float) -> str:
    """Write seconds in the two largest units."""
    left = max(0, round(seconds))
    for (unit, size), (smaller, part) in pairwise((("d", 86400), ("h", 3600), ("min", 60), ("s", 1))):
        if left >= size:
            count, rest = left // size, left % size // part
            return f"{count} {unit} {rest} {smaller}" if rest else f"{count} {unit}"
    return f"{left} s"


def print_error(message: str) -> None:
    """Print an error as one red line on stderr, after the traceback of what is being handled if that is asked for."""
    erase_live_view()
    if DEBUG in os.environ and sys.exc_info()[0] is not None:
        traceback.print_exc()
    plain_console(stderr=True, soft_wrap=True, always=True).print(f"error: {message}", style="red")
