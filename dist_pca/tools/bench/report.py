"""What every `dist-pca bench` command gives: JSON of one shape, tables, and rows of one CSV."""

import csv
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

import dist_pca
from dist_pca.config.aliases import RESULT_ALIASES
from dist_pca.errors import UserError

Value = str | int | float | None
Record = dict[str, Value]

RESULTS = Path(__file__).with_name("results.csv")
"""Results worth keeping, part of the package."""

_ENVIRONMENT = ("bench", "device", "python", "torch", "triton", "dist_pca", "commit")


def device_name() -> str:
    """The GPU's name, or the processor's model and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    processors = Path("/proc/cpuinfo")
    if processors.is_file():
        lines = processors.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on; `triton` only where it is installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found | {"dist_pca": dist_pca.__version__}


def to_json(records: Sequence[Record]) -> str:
    """`{"device": ..., "versions": {...}, "records": [...]}`, one object."""
    return json.dumps({"device": device_name(), "versions": versions(), "records": records}, indent=2)


def rich_table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """A table for the terminal, without the columns that no row fills."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    columns = _filled_columns(rows)
    # What stands first names its row and needs no heading; terminals are narrow.
    table.add_column("", no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table for a README, without the columns that no row fills."""
    columns = _filled_columns(rows)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _filled_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    columns = dict.fromkeys(column for row in rows for column in row)
    return [column for column in columns if any(row.get(column) for row in rows)]


def load_results(file: Path, bench: str) -> list[Record]:
    """Rows of one bench: where they were measured (`device`, versions, `commit`) and their records' fields.

    Raises:
        UserError: there is no such file, or it is not a table of results.
    """
    return [
        {key: _parsed(text) if key not in _ENVIRONMENT else text for key, text in row.items()}
        for row in _rows(file)
        if row["bench"] == bench
    ]


def save_results(file: Path, bench: str, records: Iterable[Record], configuration: Sequence[str]) -> None:
    """Add records to a CSV; one of the same bench, device and configuration is replaced where it stands.

    Args:
        file: The CSV; made where there is none.
        bench: Name of the bench that measured.
        records: What it measured.
        configuration: Fields of a record that say what was measured, as against what came out.

    Raises:
        UserError: the file is there but is not a table of results.
    """
    here = {"bench": bench, "device": device_name(), **versions(), "commit": commit()}
    key = ("bench", "device", *configuration)
    rows = {tuple(row.get(name, "") for name in key): row for row in (_rows(file) if file.exists() else [])}
    for record in records:
        row = here | {name: "" if value is None else str(value) for name, value in record.items()}
        rows[tuple(row.get(name, "") for name in key)] = row
    columns = dict.fromkeys([*_ENVIRONMENT, *(column for row in rows.values() for column in row)])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise UserError(f"{file} is not a file; make it with `dist-pca bench association --save {file}`")
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"bench", "device"} <= set(reader.fieldnames or ()):
            raise UserError(
                f"{file} has no columns `bench` and `device`: it is not a table of results; name another file"
            )
        return [{RESULT_ALIASES.get(column, column): text for column, text in row.items()} for row in reader]


def _parsed(text: str) -> Value:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def commit() -> str:
    """The checkout's commit, with `-dirty` where code differs from it; empty outside of a checkout."""
    folder = Path(__file__).parents[1]
    git = ("git", "-C", str(folder))
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        # An installed package may lie inside of some other project's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode == 0
    return head.stdout.strip() + ("" if clean else "-dirty")
