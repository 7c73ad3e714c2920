"""The one way in which the package prints by rich: names of classes, runs and files appear as they are.

Rich would take `[red]` in a name for a style, and `:car:` for a picture. What is styled is therefore a rich `Text`.
Descriptions of progress bars are the exception: rich reads markup in them, so they hold no names.
"""

from typing import IO

from rich.console import Console


def plain_console(
    *, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False, file: IO[str] | None = None
) -> Console:
    """Create a console that interprets nothing in strings.

    Args:
        stderr: Print to stderr and not to stdout.
        soft_wrap: Leave lines as long as they are; for messages, not for tables.
        quiet: Print nothing.
        file: Print to this file.
    """
    return Console(
        stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, file=file, markup=False, emoji=False, highlight=False
    )


def print_error(message: str) -> None:
    """Print an error as one red line on stderr."""
    plain_console(stderr=True, soft_wrap=True).print(f"error: {message}", style="red")
