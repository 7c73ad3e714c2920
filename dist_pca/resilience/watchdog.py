"""The watchdog: if a rank dies or stalls, all others exit within a bounded time, and one line names rank and step.

Each rank writes heartbeats with its phase into a store, from a thread of its own, and checks the next rank's heartbeat.
Two of them also check everybody's progress once they make none themselves: all ranks take the same steps, so if none
progresses, the one with the least progress blocks the others. A rank that finds a failure writes a verdict into the
store; all ranks read it and exit, even out of a collective. A rank that cannot reach the store any more takes the
others for lost.
"""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn

import psutil
from torch._C._distributed_c10d import Store
from typing_extensions import Self

from dist_pca.console import print_error
from dist_pca.errors import UserError
from dist_pca.owner_file import Owner, is_alive, is_local, this_process
from dist_pca.resilience.exit_status import ExitCode, exit_process, write_exit_status

Phase = Literal[
    "start",
    "data",
    "teacher",
    "forward",
    "association",
    "communication",
    "backward",
    "optimizer",
    "validation",
    "log",
    "checkpoint",
    "end",
]
_LOST_SHARE = 0.8
"""Share of the time-out after which a rank is lost; the rest is for the others to read the verdict."""
_SURVEYS = 8
"""Surveys of all ranks' progress in the time after which one is lost, by a rank that waits."""
_PEER_ERRORS = ("gloo", "nccl", "connection", "socket")
"""Words in the error of a collective whose peer is gone."""


class Heartbeat(NamedTuple):
    """The last state that a rank has written into the store."""

    beat: int
    progress: int
    step: int
    phase: Phase
    host: str
    processes: str
    pid: int
    started: float

    @property
    def owner(self) -> Owner:
        """The process of the rank."""
        return Owner(self.host, self.processes, self.pid, self.started)


class Watchdog:
    """Checks all ranks from threads while its context is open."""

    def __init__(
        self, store: Store, rank: int, size: int, *, timeout: float, folder: Path | None, same_steps: bool = True
    ) -> None:
        """Prepare to check ranks.

        Args:
            store: A connection to the process group's store that nothing else blocks.
            rank: This rank.
            size: Number of ranks.
            timeout: Seconds within which every rank has exited after one of them is lost.
            folder: The run folder, for exit.json; None writes none.
            same_steps: All ranks take the same steps together, so that a rank that lives but makes no progress is lost
                too.
        """
        self._store, self._rank, self._size, self._folder = store, rank, size, folder
        # Two ranks look at all heartbeats once nothing progresses; if all did, the store would have to answer for each
        # pair of ranks. One that does not respond is found by the rank before it.
        self._surveys = same_steps and rank in (0, size // 2)
        self._lost_after, self._interval = _LOST_SHARE * timeout, min(1.0, timeout / 20)
        # One thread counts beats, and the main thread replaces the heartbeat; neither waits for the other.
        self._beat = 0
        own = this_process()
        self._own = Heartbeat(0, 0, 0, "start", own.host, own.processes, own.pid, own.started)
        # Seconds in which this thread ran, so that a pause of the whole machine counts as silence of no rank.
        self._clock = self._moved_at = self._surveyed_at = self._heard_at = self._answered_at = 0.0
        self._moved = self._heard = 0
        # Progress of all ranks at the last survey, and beats at the first of the last few before one is lost.
        self._progress: dict[int, int] = {}
        self._beats: dict[int, int] = {}
        # Without a launcher the parent is a shell, which may exit.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._raising = False
        self._closed = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        # Without a network, a call to the store can block for a quarter of an hour.
        self._polling = threading.Thread(target=self._poll_store, daemon=True)

    def __enter__(self) -> Self:
        # At once, so that a rank that is stopped from here on is missed by the others.
        with suppress(RuntimeError):
            self._publish()
        self._watching.start()
        self._polling.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._raising = True
            if not isinstance(error, UserError):
                # Another rank's death may have caused it; then the thread finds that, and ends this process.
                from_peer = any(word in str(error).lower() for word in _PEER_ERRORS)
                time.sleep(self._lost_after if from_peer else 3 * self._interval)
            if not self._report_lost(self._rank, self._own, str(error)):
                exit_process(self._folder, ExitCode.LOST_RANK)
        self.enter("end")
        self._closed.set()
        self._watching.join()
        self._polling.join(self._lost_after)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Start a phase of step `step` (from 1), or of the current step."""
        own = self._own
        self._own = own._replace(progress=own.progress + 1, step=own.step if step is None else step, phase=phase)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            self._clock += min(now - before, 2 * self._interval)
            before = now
            if self._launcher not in (None, os.getppid()):
                # Without its launcher, and the launcher's store, nothing else would end this process: save and exit.
                os.kill(os.getpid(), signal.SIGTERM)
                return
            silent = self._clock - self._answered_at
            if silent > self._lost_after:
                self._end(f"rank {self._rank}: the launcher's store has not answered for {silent:.0f} s")

    def _poll_store(self) -> None:
        # The store is gone once its launcher is.
        while not self._closed.wait(self._interval):
            with suppress(RuntimeError):
                self._publish()
                self._read_verdict()
                self._check_next_rank()
                if self._surveys:
                    self._check_progress()
                self._answered_at = self._clock
        with suppress(RuntimeError):
            self._publish()

    def _publish(self) -> None:
        self._beat += 1
        self._store.set(f"heartbeat{self._rank}", json.dumps(self._own._replace(beat=self._beat)))

    def _heartbeat(self, rank: int) -> Heartbeat | None:
        key = f"heartbeat{rank}"
        return Heartbeat(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _check_next_rank(self) -> None:
        rank = (self._rank + 1) % self._size
        heartbeat = self._heartbeat(rank)
        if heartbeat is not None and heartbeat.beat != self._heard:
            self._heard, self._heard_at = heartbeat.beat, self._clock
            return
        silent = self._clock - self._heard_at
        if heartbeat is None:
            # All ranks have joined the process group just before.
            if silent > self._lost_after:
                never = Heartbeat(0, 0, 0, "start", host="", processes="", pid=0, started=0.0)
                self._report_lost(rank, never, f"has not started within {silent:.0f} s")
            return
        if heartbeat.phase == "end":
            return
        if is_local(heartbeat.owner, self._own.owner) and not self._is_alive(heartbeat.owner):
            self._report_lost(rank, heartbeat, "died")
        elif silent > self._lost_after:
            self._report_lost(rank, heartbeat, f"has not responded for {silent:.0f} s")

    def _is_alive(self, owner: Owner) -> bool:
        # Processes start by the clock of the machine, which may have been set since they wrote when.
        shift = this_process().started - self._own.started
        return is_alive(replace(owner, started=owner.started + shift))

    def _check_progress(self) -> None:
        if self._own.progress != self._moved:
            self._moved, self._moved_at, self._progress = self._own.progress, self._clock, {}
        still = self._clock - self._moved_at
        late = still >= self._lost_after - 4 * self._interval
        if not late:
            self._beats = {}
        due = late or min(still, self._clock - self._surveyed_at) >= self._lost_after / _SURVEYS
        if not due or self._own.phase == "end":
            return
        self._surveyed_at = self._clock
        found = {rank: self._heartbeat(rank) for rank in range(self._size)}
        heartbeats = {
            rank: heartbeat for rank, heartbeat in found.items() if heartbeat is not None and heartbeat.phase != "end"
        }
        before, self._progress = self._progress, {rank: heartbeat.progress for rank, heartbeat in heartbeats.items()}
        if any(before.get(rank, progress) != progress for rank, progress in self._progress.items()):
            # This rank waits for one that is at work, such as on more validation images.
            self._moved_at, self._beats = self._clock, {}
        elif not late:
            return
        elif not self._beats:
            self._beats = {rank: heartbeat.beat for rank, heartbeat in heartbeats.items()}
        elif still > self._lost_after:
            # Of ranks that wait in one collective, one without heartbeats is the cause.
            silent = [rank for rank, heartbeat in heartbeats.items() if heartbeat.beat == self._beats.get(rank)]
            rank = min(silent or heartbeats, key=lambda r: heartbeats[r].progress)
            self._report_lost(
                rank, heartbeats[rank], f"has {'not responded' if silent else 'not progressed'} for {still:.0f} s"
            )

    def _report_lost(self, rank: int, heartbeat: Heartbeat, what: str) -> bool:
        """Write the verdict that a rank is lost; whether it is the first, by which all ranks exit."""
        verdict = json.dumps([self._rank, rank, heartbeat, what])
        return bool(self._store.compare_set("verdict", "", verdict).decode() == verdict)

    def _read_verdict(self) -> None:
        if not self._store.check(["verdict"]):
            return
        reporter, rank, values, what = json.loads(self._store.get("verdict"))
        heartbeat = Heartbeat(*values)
        if self._raising and reporter == rank == self._rank:
            # The exception that is being raised reports it.
            return
        local = is_local(heartbeat.owner, self._own.owner)
        if local and self._rank != rank != reporter and self._is_alive(heartbeat.owner):
            # The launcher would wait for a stopped process.
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                lost = psutil.Process(heartbeat.pid)
                for process in (*lost.children(recursive=True), lost):
                    process.kill()
        if reporter == self._rank:
            who = f" ({heartbeat.host}, process {heartbeat.pid})" if heartbeat.pid else ""
            self._end(f"rank {rank}{who} {what}, in step {heartbeat.step}, {heartbeat.phase}")
        exit_process(self._folder, ExitCode.LOST_RANK)

    def _end(self, message: str) -> NoReturn:
        message += "; start the run again"
        if self._folder is not None:
            write_exit_status(self._folder, ExitCode.LOST_RANK, message)
        print_error(message)
        exit_process(self._folder, ExitCode.LOST_RANK)
