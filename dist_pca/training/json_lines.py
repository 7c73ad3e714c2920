"""JSON-lines files that a run appends to, and that a resumed run continues."""

import json
from pathlib import Path

from dist_pca.errors import UserError


def append_line(file: Path, line: str) -> None:
    """Append a line to a file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with file.open("a") as lines:
            lines.write(line + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error}); make room there and start the run again") from error


def drop_lines_after(file: Path, step: int) -> None:
    """Remove lines whose `step` is beyond this one; a killed run may have written some after its newest checkpoint."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            # A killed run can leave its last line incomplete.
            continue
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(kept))
    partial.replace(file)
