"""A lock on the run folder: one job trains in it at a time.

The folder's `lock.json` names the owner. Advisory locks (fcntl, flock) are unreliable on network file systems, so the
file is created exclusively, which they do guarantee, and its owner touches it every few seconds. A lock is stale, and
is taken over, if its owner is a dead process of this machine, or on another machine has not touched it for a minute, or
if it cannot be read.
All times are the file system's, so that clocks may differ.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import psutil
import torch.distributed as dist
from pydantic import TypeAdapter

from dist_pca.console import print_error
from dist_pca.errors import UserError
from dist_pca.files import PART, read_record, write_record
from dist_pca.resilience.exit_status import ExitCode, exit_process

_log = logging.getLogger("dist_pca.training")
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
UNREADABLE_SECONDS = 5.0
_SETTLE_SECONDS = 0.5
"""Time after which, of several processes that take over a stale lock at once, the last has written it."""


@dataclass(frozen=True)
class Owner:
    """The process that holds the lock."""

    host: str
    processes: str
    """The namespace of process ids that `pid` belongs to: containers of one machine may have their own."""
    pid: int
    started: float
    """Create time of the process, in seconds of its machine's clock, since process ids are reused."""


_OWNER = TypeAdapter(Owner)


@contextmanager
def run_lock(folder: Path, *, wait: float = 0.0, waiting: Callable[[], object] = bool) -> Iterator[None]:
    """Lock a run folder for this job while the context is open. Collective; rank 0 owns the lock.

    Args:
        folder: The run folder.
        wait: Seconds to wait for another job to release the lock.
        waiting: Called on every rank about once a second while rank 0 waits.

    Raises:
        UserError: on every rank, another job holds the lock, and its host and process are named; or it cannot be
            written.
    """
    path, is_rank0 = folder / "lock.json", dist.get_rank() == 0
    attempts = _acquire(path, _this_process(), wait) if is_rank0 else repeat(None)
    while not _on_all_ranks(next(attempts)):
        waiting()
        time.sleep(1)
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


def _on_all_ranks(outcome: bool | str | None) -> bool:
    """Whether rank 0 has the lock now. Collective.

    Raises:
        UserError: the outcome on rank 0 is a message.
    """
    outcomes = [outcome]
    dist.broadcast_object_list(outcomes, src=0)
    if isinstance(outcomes[0], str):
        raise UserError(outcomes[0])
    return bool(outcomes[0])


def _acquire(path: Path, own: Owner, wait: float) -> Iterator[bool | str]:
    """Yield the outcome of each attempt: whether the lock is held now, or why it is refused."""
    deadline = time.monotonic() + wait
    first_touch, announced = None, False
    while True:
        try:
            if _create(path, own):
                yield True
            owner, touched, age = _read(path), path.stat().st_mtime_ns, _age(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"{path}: cannot be written ({error}); make room there and start the run again"
            continue
        first_touch = first_touch or touched
        local = owner is not None and (owner.host, owner.processes) == (own.host, own.processes)
        # A lock is written whole, so one that cannot be read is damaged; perhaps a file system without links delays it.
        limit = UNREADABLE_SECONDS if owner is None else STALE_SECONDS
        stale = not _is_alive(owner) if local and owner is not None else age > limit
        who = f"process {owner.pid} on {owner.host}" if owner else "a process that cannot be read from it"
        if stale:
            if not local:
                _log.warning("%s: of %s, untouched for %.0f s; taking it over", path, who, age)
            try:
                write_record(path, asdict(own))
            except OSError as error:
                yield f"{path}: cannot be taken over ({error}); fix that and start the run again"
            time.sleep(_SETTLE_SECONDS)
            if _read(path) == own:
                yield True
        elif (local or touched != first_touch) and time.monotonic() >= deadline:
            yield (
                f"{path}: {who} trains in this folder, and last touched the lock {age:.0f} s ago; wait until it ends, "
                "stop it, or choose another name="
            )
        elif not announced:
            _log.info("%s: of %s; waiting until it is released, or untouched for %.0f s", path, who, limit)
            announced = True
        yield False


def _create(path: Path, own: Owner) -> bool:
    """Create the lock with its owner's name in it; False if there is one."""
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
    with suppress(UserError):
        return read_record(path, _OWNER, "remove it")
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
