"""A lock on the run folder: one job trains in it at a time.

The folder's `lock.json` names the owner. Advisory locks (fcntl, flock) are unreliable on network file systems, so the
file is created exclusively, which they do guarantee, and its owner touches it every few seconds. A lock is stale, and
is taken over, if its owner is a dead process of this machine, or on another machine has not touched it for a minute.
All times are the file system's, so that clocks may differ.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch.distributed as dist

from dist_pca.distributed import raise_on_all_ranks
from dist_pca.errors import UserError
from dist_pca.files import write_json
from dist_pca.resilience.exit_status import ExitCode, exit_process, print_error

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_SETTLE_SECONDS = 0.5
"""Time after which, of several processes that take over a stale lock at once, the last has written it."""


class Owner(NamedTuple):
    """The process that holds the lock."""

    host: str
    processes: str
    """The namespace of process ids that `pid` belongs to: containers of one machine may have their own."""
    pid: int
    started: float
    """Create time of the process, in seconds of its machine's clock, since process ids are reused."""


@contextmanager
def run_lock(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Lock a run folder for this job while the context is open. Collective; rank 0 owns the lock.

    Args:
        folder: The run folder.
        wait: Seconds to wait for another job to release the lock.

    Raises:
        UserError: on every rank, another job holds the lock; its host and process are named.
    """
    path, refusal, is_rank0 = folder / "lock.json", None, dist.get_rank() == 0
    if is_rank0:
        try:
            _acquire(path, _this_process(), wait)
        except UserError as error:
            refusal = str(error)
    raise_on_all_ranks(refusal)
    released = threading.Event()
    heartbeat = threading.Thread(target=_touch_until, args=(path, _this_process(), released), daemon=True)
    if is_rank0:
        heartbeat.start()
    try:
        yield
    finally:
        if is_rank0:
            released.set()
            heartbeat.join()
            if _read(path) == _this_process():
                path.unlink(missing_ok=True)


def _acquire(path: Path, own: Owner, wait: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    first_touch = None
    while True:
        with suppress(FileExistsError), path.open("x") as file:
            file.write(json.dumps(own._asdict()) + "\n")
            return
        owner = _read(path)
        try:
            touched, age = path.stat().st_mtime_ns, _age(path)
        except FileNotFoundError:
            continue
        first_touch = first_touch or touched
        local = owner is not None and owner[:2] == own[:2]
        stale = not _is_alive(owner) if local and owner is not None else age > STALE_SECONDS
        if not stale and (local or touched != first_touch) and time.monotonic() >= deadline:
            who = f"process {owner.pid} on {owner.host}" if owner else "a process that is writing its name"
            raise UserError(
                f"{path}: {who} trains in this folder, and last touched the lock {age:.0f} s ago; wait until it ends, "
                "stop it, or choose another name="
            )
        if stale:
            write_json(path, own._asdict())
            time.sleep(_SETTLE_SECONDS)
            if _read(path) == own:
                return
        time.sleep(1)


def _touch_until(path: Path, own: Owner, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        owner = _read(path)
        if owner is not None and owner != own:
            # This process was paused for so long that its lock was stale; saving now would overwrite the other's files.
            print_error(f"{path}: process {owner.pid} on {owner.host} has taken over this run; stopping this one")
            exit_process(path.parent, ExitCode.REFUSED)
        with suppress(OSError):
            os.utime(path)


def _age(path: Path) -> float:
    """Age of a file in seconds, by the file system's clock."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """Read the lock's owner; None if the file is gone or not yet written."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _this_process() -> Owner:
    try:
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        processes = ""
    return Owner(socket.gethostname(), processes, os.getpid(), psutil.Process().create_time())


def _is_alive(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        return bool(
            abs(process.create_time() - owner.started) < 1
            and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        )
    except psutil.NoSuchProcess:
        return False
