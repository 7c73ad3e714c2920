"""Files of JSON lines that a run adds to, and that a resumed run goes on with."""

import json
from pathlib import Path

from dist_pca.errors import UserError


def append_line(file: Path, line: str) -> None:
    """Add a line.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with file.open("a") as lines:
            lines.write(line + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error}); make room there and start the run again") from error


def drop_lines_after(file: Path, step: int) -> None:
    """Leave the lines whose `step` is at most this; those of a killed run go on after its newest checkpoint."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            # The last line of a killed run can be cut short.
            continue
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text("".join(kept))
    aside.replace(file)
