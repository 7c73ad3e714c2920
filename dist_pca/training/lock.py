"""One job trains in a run folder at a time.

The folder's `lock.json` names who does. Advisory locks (fcntl, flock) are not to be trusted on network file systems, so
the file is made exclusively, which they do guarantee, and its owner touches it every few seconds. A lock whose owner is
a dead process of this machine, or on another machine has not been touched for a minute, is taken over. All times are
those that the file system gives, so that clocks may differ.
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

import psutil  # type: ignore[import-untyped]
import torch.distributed as dist

from dist_pca.errors import UserError
from dist_pca.training.distributed import raise_on_all_ranks
from dist_pca.training.outcome import ExitCode, leave, say_error

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_SETTLE_SECONDS = 0.5
"""After which the last of several that take over a lock at once has written it."""


class Owner(NamedTuple):
    """Who trains."""

    host: str
    processes: str
    """Which numbering of processes `pid` is of: containers of one machine may have their own."""
    pid: int
    started: float
    """When the process began, in seconds of its machine's clock: numbers of processes are used again."""


@contextmanager
def run_lock(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a run folder for this job while the context is open. Collective; rank 0 holds it.

    Args:
        folder: The run folder.
        patience: Seconds to wait for a job that trains there to leave.

    Raises:
        UserError: on every rank, another job trains there; its machine and process are named.
    """
    path, refusal, mine = folder / "lock.json", None, dist.get_rank() == 0
    if mine:
        try:
            _take(path, _this_process(), patience)
        except UserError as error:
            refusal = str(error)
    raise_on_all_ranks(refusal)
    released = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, _this_process(), released), daemon=True)
    if mine:
        beat.start()
    try:
        yield
    finally:
        if mine:
            released.set()
            beat.join()
            if _read(path) == _this_process():
                path.unlink(missing_ok=True)


def _take(path: Path, own: Owner, patience: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + patience
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
        here = owner is not None and owner[:2] == own[:2]
        dead = not _is_alive(owner) if here and owner is not None else age > STALE_SECONDS
        if not dead and (here or touched != first_touch) and time.monotonic() >= give_up:
            who = f"process {owner.pid} on {owner.host}" if owner else "a process that is about to say which it is"
            raise UserError(
                f"{path}: {who} trains in this folder, and gave a sign of life {age:.0f} s ago; wait for it, end it, "
                "or choose another name="
            )
        if dead:
            aside = path.with_name(f".{path.name}.{own.host}.{own.pid}.partial")
            aside.write_text(json.dumps(own._asdict()) + "\n")
            aside.replace(path)
            time.sleep(_SETTLE_SECONDS)
            if _read(path) == own:
                return
        time.sleep(1)


def _beat(path: Path, own: Owner, released: threading.Event) -> None:
    while not released.wait(BEAT_SECONDS):
        owner = _read(path)
        if owner is not None and owner != own:
            # This process was paused for so long that it passed for dead; to save now would be to write over the other.
            say_error(f"{path}: process {owner.pid} on {owner.host} has taken over this run; leaving it to that")
            leave(path.parent, ExitCode.REFUSED)
        with suppress(OSError):
            os.utime(path)


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the file system's clock."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """The lock's owner; None where it is gone or not yet written."""
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
