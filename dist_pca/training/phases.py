"""Time of each phase of a step: by the clock on a CPU, by events in its queue on a GPU."""

import time
from collections import deque
from typing import Any

import torch
from torch.profiler import record_function
from typing_extensions import Self

from dist_pca.association.phases import listen
from dist_pca.config.aliases import PHASE_ALIASES
from dist_pca.resilience.watchdog import Phase, Watchdog

_MAX_PENDING = 256
"""Number of events after which those that have completed are read."""


class PhaseClock:
    """Reports the phases of this rank to the watchdog, and sums the seconds of each.

    On a GPU the seconds are those between events in its queue, so a phase counts the time in which its work runs or the
    GPU waits for it. Host and GPU are synchronised only when the sums are read.
    """

    def __init__(self, watchdog: Watchdog, device: torch.device) -> None:
        """Start in the phase `start`."""
        self.labelled = False
        """Label phases in the trace of a running profiler."""
        self._watchdog = watchdog
        self._on_gpu = device.type == "cuda"
        self._phase: Phase = "start"
        self._seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, Any]] = deque()
        self._spare: list[Any] = []
        self._since = time.perf_counter()
        self._label: record_function | None = None
        self._mark("start")

    def __enter__(self) -> Self:
        listen(self._enter_association)
        return self

    def __exit__(self, *_: object) -> None:
        listen(None)

    def enter(self, phase: Phase, step: int | None = None) -> Phase:
        """Start a phase of step `step` (from 1), or of the current step; return the phase that ends."""
        before, self._phase = self._phase, phase
        self._watchdog.enter(phase, step)
        self._mark(before)
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        if self.labelled:
            self._label = record_function(phase)
            self._label.__enter__()  # type: ignore[no-untyped-call]
        return before

    def _enter_association(self, phase: str) -> Phase:
        # The loss, which other trainers use too, has a name of its own for the phase.
        renamed: Any = PHASE_ALIASES.get(phase, phase)
        return self.enter(renamed)

    def take(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self._mark(self._phase)
        self._read(wait=True)
        taken, self._seconds = self._seconds, {}
        return taken

    def _mark(self, ended: str) -> None:
        """Record the end of the phase that started at the previous mark."""
        if not self._on_gpu:
            now = time.perf_counter()
            self._seconds[ended] = self._seconds.get(ended, 0.0) + now - self._since
            self._since = now
            return
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((ended, event))
        if len(self._marks) > _MAX_PENDING:
            self._read(wait=False)

    def _read(self, *, wait: bool) -> None:
        if wait and self._marks:
            self._marks[-1][1].synchronize()
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, start = self._marks.popleft()
            ended, end = self._marks[0]
            self._seconds[ended] = self._seconds.get(ended, 0.0) + start.elapsed_time(end) / 1000
            self._spare.append(start)
