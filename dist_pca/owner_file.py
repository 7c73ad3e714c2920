"""Files that name the process that owns something, such as a lock on a folder.

Advisory locks (fcntl, flock) are unreliable on network file systems, so the file is created exclusively, which they do
guarantee, and its owner touches it every few seconds.
"""

import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from dist_pca.errors import UserError
from dist_pca.files import PART, read_record, write_record

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
UNREADABLE_SECONDS = 5.0
SETTLE_SECONDS = 0.5
"""Time after which, of several processes that take over a stale file at once, the last has written it."""


@dataclass(frozen=True)
class Owner:
    """The process that owns a file."""

    host: str
    processes: str
    """The namespace of process ids that `pid` belongs to: containers of one machine may have their own."""
    pid: int
    started: float
    """Create time of the process, in seconds of its machine's clock, since process ids are reused."""


_OWNER = TypeAdapter(Owner)


def create_owned(path: Path, own: Owner) -> bool:
    """Create a file with its owner's name in it; False if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{own.host}.{own.pid}{PART}")
    try:
        write_record(part, asdict(own))
        try:
            # Unlike a rename, a link fails where there is a file already.
            path.hardlink_to(part)
        except FileExistsError:
            return False
        except OSError:
            # A file system without links: the name appears before its content.
            with path.open("x") as file:
                file.write(part.read_text())
        return True
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)


def read_owner(path: Path) -> Owner | None:
    """Read a file's owner; None if the file is gone or not yet written."""
    with suppress(UserError):
        return read_record(path, _OWNER, "remove it")
    return None


def age_of(path: Path) -> float:
    """Age of a file in seconds, by the file system's clock."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def this_process() -> Owner:
    """This process as an owner."""
    try:
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        processes = ""
    return Owner(socket.gethostname(), processes, os.getpid(), psutil.Process().create_time())


def is_local(owner: Owner | None, own: Owner) -> bool:
    """Whether an owner is a process that this one can look up."""
    return owner is not None and (owner.host, owner.processes) == (own.host, own.processes)


def is_alive(owner: Owner) -> bool:
    """Whether an owner, which must be local, is running."""
    try:
        process = psutil.Process(owner.pid)
        return bool(
            abs(process.create_time() - owner.started) < 1
            and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        )
    except psutil.NoSuchProcess:
        return False
