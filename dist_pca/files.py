"""Files and folders that are written whole or not at all, and JSON-lines files that a run appends to."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from dist_pca.errors import UserError, explain

T = TypeVar("T")
FORMAT = 2
"""Version of the JSON objects in a run folder. Those of release 0.1 carry none and are of the first."""
PART = ".part"
"""Ending of a file that is being written; a killed process leaves one behind."""


@contextmanager
def replacing(path: Path, part_folder: Path | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file to write, which replaces `path` at the end and is removed on any failure.

    Args:
        path: The file to create or replace.
        part_folder: Folder of the temporary file, on the same file system; None is the file's own.
    """
    # The name is unique, so that a dying process cannot rename what another one is writing.
    part = (part_folder or path.parent) / f".{path.name}.{uuid4().hex}{PART}"
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str, part_folder: Path | None = None) -> None:
    """Write a text file atomically and durably; `part_folder` as for `replacing`."""
    with replacing(path, part_folder) as part:
        part.write_text(text, encoding="utf-8")
        sync(part)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically and durably."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """Write a JSON object atomically and durably, with the version of its format."""
    write_json(path, {"version": FORMAT, **record})


def read_record(path: Path, shape: TypeAdapter[T], remedy: str) -> T:
    """Read a file that `write_record` wrote, now or in an earlier release.

    Args:
        path: The file.
        shape: What it must hold; fields that it does not know are left out.
        remedy: How to continue without the file.

    Raises:
        UserError: it is missing, damaged, or of a newer format; a field that is missing or of another type is named.
    """
    try:
        record = json.loads(path.read_bytes())
        version = record.pop("version", 1) if isinstance(record, dict) else 1
        if isinstance(version, int) and version > FORMAT:
            reason = f"a newer dist-pca wrote it, in format {version}, and this one reads up to {FORMAT}"
            raise UserError(f"{path}: cannot be read ({reason}); update dist-pca")
        return shape.validate_python(record)
    except ValidationError as error:
        raise UserError(f"{path}: cannot be read ({explain(error.errors()[:1], ())}); {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a file of JSON objects, as text and as values; nothing if there is no such file.

    Lines that are none are left out: a killed run leaves its last line incomplete, a full disk one in the middle.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                if isinstance(values := json.loads(line), dict):
                    yield line, values


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder that no other process writes to."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder in such a way that a partly removed one is never taken for a whole one."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def new_folder(out: Path, option: str) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, which is renamed to `out` at the end, or removed if anything fails.

    Collective if torch.distributed is initialised: ranks, which must share the file system, write into one folder.

    Args:
        out: The folder to create; if it exists, it must be empty.
        option: Command-line option of the folder, for messages.

    Raises:
        UserError: `out` is not empty, or cannot be written.
    """
    # Imported here, because building shards needs files but not torch.
    from dist_pca.distributed import barrier, is_rank0

    part = out.absolute().with_name(f".{out.absolute().name}.partial")
    if is_rank0():
        refuse_existing(out, option)
    try:
        if is_rank0():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()
        yield part
        barrier()
        if is_rank0():
            if out.exists():
                out.rmdir()
            part.rename(out)
        barrier()
    except BaseException as error:
        # A rank that fails removes the folder for all ranks; the launcher ends the others.
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{option} {out}: cannot be written ({error}); give another folder") from error
        raise


def refuse_existing(out: Path, option: str) -> None:
    """Check that a folder does not exist or is empty.

    Raises:
        UserError: it is a file, or is not empty.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{option} {out}: exists already; remove it or give another folder")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def append_line(file: Path, line: str) -> None:
    """Append a line to a file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error}); make room there and start the run again") from error


def last_step(file: Path) -> int:
    """Highest `step` in a file of JSON lines; 0 if there is none."""
    return max((step for _, values in read_lines(file) if isinstance(step := values.get("step"), int)), default=0)


def drop_lines_after(file: Path, step: int) -> None:
    """Remove lines whose `step` is beyond this one; a killed run may have written some after its newest checkpoint.

    Raises:
        UserError: it cannot be written.
    """
    if not file.is_file():
        return
    kept = [line for line, values in read_lines(file) if isinstance(at := values.get("step"), int) and at <= step]
    try:
        write_whole(file, "".join(kept))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error}); fix that and start the run again") from error
