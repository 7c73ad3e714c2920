"""The one way in which the package prints by rich: names of classes, runs and files appear as they are.

Rich would take `[red]` in a name for a style, and `:car:` for a picture. What is styled is therefore a rich `Text`.
Descriptions of progress bars are the exception: rich reads markup in them, so they hold no names.
"""

import os
import sys
import traceback
from typing import IO

from rich.console import Console

DEBUG = "DIST_PCA_DEBUG"
"""Environment variable of `--debug`, which ranks inherit."""
QUIET = "DIST_PCA_QUIET"
"""Environment variable of `--quiet`."""


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


def print_warning(message: str) -> None:
    """Print a warning as one yellow line on stderr."""
    plain_console(stderr=True, soft_wrap=True, always=True).print(f"warning: {message}", style="yellow")


def print_error(message: str) -> None:
    """Print an error as one red line on stderr, after the traceback of what is being handled if that is asked for."""
    if DEBUG in os.environ and sys.exc_info()[0] is not None:
        traceback.print_exc()
    plain_console(stderr=True, soft_wrap=True, always=True).print(f"error: {message}", style="red")
