"""Locks of builds on a staging folder: flock, or owner files on a file system without it, such as some of Lustre."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from dist_pca.errors import UserError
from dist_pca.files import write_record
from dist_pca.owner_file import (
    HEARTBEAT_SECONDS,
    SETTLE_SECONDS,
    STALE_SECONDS,
    UNREADABLE_SECONDS,
    age_of,
    create_owned,
    is_alive,
    is_local,
    read_owner,
    this_process,
)

_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_POLL_SECONDS = 0.2


@contextmanager
def locked(path: Path, kind: int, busy: str = "") -> Iterator[int]:
    """Lock a file and yield its descriptor; the lock ends with this process, however that ends.

    Args:
        path: The file; it is created.
        kind: Flags of `fcntl.flock`.
        busy: Message of the error.

    Raises:
        UserError: another process has the lock, and `kind` has LOCK_NB.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, kind)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            lock: AbstractContextManager[None] = _owned(path, kind, busy)
        else:
            lock = nullcontext()
        with lock:
            yield handle
    finally:
        os.close(handle)


@contextmanager
def _owned(path: Path, kind: int, busy: str) -> Iterator[None]:
    """Lock a file by owner files beside it, one for an exclusive lock, and one for each holder of a shared one."""
    shared = kind & fcntl.LOCK_SH == fcntl.LOCK_SH
    exclusive = path.with_name(f"{path.name}.owner")
    mine = path.with_name(f"{exclusive.name}-{uuid4().hex}") if shared else exclusive
    while not _take(mine, [exclusive] if shared else None):
        if kind & fcntl.LOCK_NB:
            raise UserError(busy)
        time.sleep(_POLL_SECONDS)
    released = threading.Event()
    heartbeat = threading.Thread(target=_touch_until, args=(mine, released), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        released.set()
        heartbeat.join()
        # A finished build has moved its folder away, and the name may be another process's by now.
        if read_owner(mine) == this_process():
            mine.unlink(missing_ok=True)


def _take(mine: Path, others: list[Path] | None) -> bool:
    """Create an owner file, or take a stale one over; False if another process holds it or one that excludes it."""
    own = this_process()
    if not create_owned(mine, own):
        if _is_held(mine):
            return False
        with suppress(FileNotFoundError):
            write_record(mine, asdict(own))
        time.sleep(SETTLE_SECONDS)
        if read_owner(mine) != own:
            return False
    # Created first and looked for then, so that of two processes at least one sees the other.
    if any(_is_held(other) for other in others or mine.parent.glob(f"{mine.name}-*")):
        mine.unlink(missing_ok=True)
        return False
    return True


def _is_held(path: Path) -> bool:
    owner = read_owner(path)
    try:
        age = age_of(path)
    except FileNotFoundError:
        return False
    if owner is not None and is_local(owner, this_process()):
        return is_alive(owner)
    return age <= (UNREADABLE_SECONDS if owner is None else STALE_SECONDS)


def _touch_until(path: Path, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
