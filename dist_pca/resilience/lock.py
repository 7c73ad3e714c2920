"""A lock on the run folder: one job trains in it at a time.

The folder's `lock.json` names the owner, who touches it every few seconds. A lock is stale, and is taken over, if its
owner is a dead process of this machine, or on another machine has not touched it for a minute, or if it cannot be read.
All times are the file system's, so that clocks may differ.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import repeat
from pathlib import Path

import torch.distributed as dist

from dist_pca.console import print_error
from dist_pca.errors import UserError
from dist_pca.files import write_record
from dist_pca.owner_file import (
    HEARTBEAT_SECONDS,
    SETTLE_SECONDS,
    STALE_SECONDS,
    UNREADABLE_SECONDS,
    Owner,
    age_of,
    create_owned,
    is_alive,
    is_local,
    read_owner,
    this_process,
)
from dist_pca.resilience.exit_status import ExitCode, exit_process

_log = logging.getLogger("dist_pca.training")


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
    attempts = _acquire(path, this_process(), wait) if is_rank0 else repeat(None)
    while not _on_all_ranks(next(attempts)):
        waiting()
        time.sleep(1)
    released = threading.Event()
    heartbeat = threading.Thread(target=_touch_until, args=(path, this_process(), released), daemon=True)
    if is_rank0:
        heartbeat.start()
    try:
        yield
    finally:
        if is_rank0:
            released.set()
            heartbeat.join()
            if read_owner(path) == this_process():
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
            if create_owned(path, own):
                yield True
            owner, touched, age = read_owner(path), path.stat().st_mtime_ns, age_of(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"{path}: cannot be written ({error}); make room there and start the run again"
            continue
        first_touch = first_touch or touched
        local = is_local(owner, own)
        # A lock is written whole, so one that cannot be read is damaged; perhaps a file system without links delays it.
        limit = UNREADABLE_SECONDS if owner is None else STALE_SECONDS
        stale = not is_alive(owner) if local and owner is not None else age > limit
        who = f"process {owner.pid} on {owner.host}" if owner else "a process that cannot be read from it"
        if stale:
            if not local:
                _log.warning("%s: of %s, untouched for %.0f s; taking it over", path, who, age)
            try:
                write_record(path, asdict(own))
            except OSError as error:
                yield f"{path}: cannot be taken over ({error}); fix that and start the run again"
            time.sleep(SETTLE_SECONDS)
            if read_owner(path) == own:
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


def _touch_until(path: Path, own: Owner, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        owner = read_owner(path)
        if owner is not None and owner != own:
            # This process was paused for so long that its lock was stale; saving now would overwrite the other's files.
            print_error(f"{path}: process {owner.pid} on {owner.host} has taken over this run; stopping this one")
            exit_process(path.parent, ExitCode.REFUSED)
        with suppress(OSError):
            os.utime(path)
