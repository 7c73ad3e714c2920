"""A rank that dies or stalls ends all others within a bounded time, and one line says which, where and when.

Each rank tells a store, from a thread of its own, what it is doing. It watches the next rank's pulse, and its own
progress: ranks take the same steps, so when nobody moves, whoever has come least far holds up the others. Who finds
something writes it into the store, where all ranks see it and leave, whatever they wait in. To whom the store does not
answer any more, the others are lost.
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn

import psutil  # type: ignore[import-untyped]
from torch._C._distributed_c10d import Store
from typing_extensions import Self

from dist_pca.errors import UserError
from dist_pca.training.outcome import ExitCode, leave, record_outcome, say_error

Phase = Literal[
    "start",
    "data",
    "teacher",
    "forward",
    "association",
    "exchange",
    "backward",
    "optimizer",
    "validation",
    "log",
    "checkpoint",
    "end",
]
_SHARE = 0.8
"""Of the time-out, after which a rank is lost; the rest is for telling the others."""
_OF_A_LOST_PEER = ("gloo", "nccl", "connection", "socket")
"""Words in the error of a collective whose other side is gone."""


class Pulse(NamedTuple):
    """What a rank last told."""

    beat: int
    progress: int
    step: int
    phase: Phase
    host: str
    pid: int


class Watchdog:
    """Watches ranks from a thread while its context is open."""

    def __init__(self, store: Store, rank: int, size: int, *, timeout: float, folder: Path) -> None:
        """Prepare to watch.

        Args:
            store: A client of the process group's store that nothing else waits in.
            rank: This rank.
            size: Number of ranks.
            timeout: Seconds in which every rank has left after one of them is lost.
            folder: The run folder, for exit.json.
        """
        self._store, self._rank, self._size, self._folder = store, rank, size, folder
        self._lost_after, self._interval = _SHARE * timeout, min(1.0, timeout / 20)
        # The thread writes the beat and the main thread the pulse; neither waits for the other.
        self._beat = 0
        self._own = Pulse(0, 0, 0, "start", socket.gethostname(), os.getpid())
        # Seconds of watching. Where all processes of a machine were paused together, nobody was silent.
        self._clock = self._moved_at = self._heard_at = self._answered_at = 0.0
        self._moved = self._heard = 0
        self._beats: dict[int, int] = {}
        # Without a launcher the parent is a shell, which may go.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._raising = False
        self._closed = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        # Where the network is gone, a call to the store can wait for a quarter of an hour.
        self._asking = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Self:
        self._watching.start()
        self._asking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._raising = True
            if not isinstance(error, UserError):
                # Perhaps another rank's death is behind it; then the thread finds out, and ends this process.
                from_peer = any(word in str(error).lower() for word in _OF_A_LOST_PEER)
                time.sleep(self._lost_after if from_peer else 3 * self._interval)
            if not self._accuse(self._rank, self._own, str(error)):
                leave(self._folder, ExitCode.LOST_RANK)
        self.enter("end")
        self._closed.set()
        self._watching.join()
        self._asking.join(self._lost_after)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """This rank begins a phase, of step number `step` (from 1) or of the same step as before."""
        own = self._own
        self._own = own._replace(progress=own.progress + 1, step=own.step if step is None else step, phase=phase)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            self._clock += min(now - before, 2 * self._interval)
            before = now
            if self._launcher not in (None, os.getppid()):
                # The launcher is gone, and its store with it; nobody would end this process. Save, and leave.
                os.kill(os.getpid(), signal.SIGTERM)
                return
            silent = self._clock - self._answered_at
            if silent > self._lost_after:
                self._end(f"rank {self._rank}: the launcher's store has not answered for {silent:.0f} s")

    def _ask(self) -> None:
        # The store is gone where its launcher is.
        while not self._closed.wait(self._interval):
            with suppress(RuntimeError):
                self._tell()
                self._obey()
                self._watch_next()
                self._watch_own()
                self._answered_at = self._clock
        with suppress(RuntimeError):
            self._tell()

    def _tell(self) -> None:
        self._beat += 1
        self._store.set(f"pulse{self._rank}", json.dumps(self._own._replace(beat=self._beat)))

    def _pulse(self, rank: int) -> Pulse | None:
        key = f"pulse{rank}"
        return Pulse(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _watch_next(self) -> None:
        rank = (self._rank + 1) % self._size
        pulse = self._pulse(rank)
        if pulse is None or pulse.beat != self._heard:
            self._heard, self._heard_at = 0 if pulse is None else pulse.beat, self._clock
            return
        silent = self._clock - self._heard_at
        if pulse.phase == "end":
            return
        if pulse.host == self._own.host and not _is_alive(pulse.pid):
            self._accuse(rank, pulse, "died")
        elif silent > self._lost_after:
            self._accuse(rank, pulse, f"has given no sign of life for {silent:.0f} s")

    def _watch_own(self) -> None:
        if self._own.progress != self._moved:
            self._moved, self._moved_at = self._own.progress, self._clock
        still = self._clock - self._moved_at
        if still < self._lost_after - 4 * self._interval or self._own.phase == "end":
            self._beats = {}
            return
        found = {rank: self._pulse(rank) for rank in range(self._size)}
        pulses = {rank: pulse for rank, pulse in found.items() if pulse is not None and pulse.phase != "end"}
        if not self._beats:
            self._beats = {rank: pulse.beat for rank, pulse in pulses.items()}
        elif still > self._lost_after:
            # Of ranks that wait in one collective, the one without a pulse is it.
            silent = [rank for rank, pulse in pulses.items() if pulse.beat == self._beats.get(rank)]
            rank = min(silent or pulses, key=lambda r: pulses[r].progress)
            self._accuse(
                rank, pulses[rank], f"has {'given no sign of life' if silent else 'not moved'} for {still:.0f} s"
            )

    def _accuse(self, rank: int, pulse: Pulse, what: str) -> bool:
        """Whether this is the verdict that all ranks leave by; of several the first one counts."""
        verdict = json.dumps([self._rank, rank, pulse, what])
        return bool(self._store.compare_set("verdict", "", verdict).decode() == verdict)

    def _obey(self) -> None:
        if not self._store.check(["verdict"]):
            return
        accuser, rank, values, what = json.loads(self._store.get("verdict"))
        pulse = Pulse(*values)
        if self._raising and accuser == rank == self._rank:
            # The exception that is on its way says so.
            return
        if pulse.host == self._own.host and self._rank != rank != accuser:
            # A stopped process keeps its launcher waiting.
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                lost = psutil.Process(pulse.pid)
                for process in (*lost.children(recursive=True), lost):
                    process.kill()
        if accuser == self._rank:
            self._end(f"rank {rank} ({pulse.host}, process {pulse.pid}) {what}, in step {pulse.step}, {pulse.phase}")
        leave(self._folder, ExitCode.LOST_RANK)

    def _end(self, message: str) -> NoReturn:
        message += "; start the run again"
        record_outcome(self._folder, ExitCode.LOST_RANK, message)
        say_error(message)
        leave(self._folder, ExitCode.LOST_RANK)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False
