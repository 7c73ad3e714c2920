"""Stopping on request: signals and wall-clock limits, and the step after which all ranks stop together."""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dist_pca.resilience.exit_status import ExitCode, exit_process

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 2.0
"""SLURM signals every process of a step, and launchers forward signals: one request arrives several times."""
SLURM_MARGIN = 120.0
"""Seconds before SLURM ends the job at which the run saves and exits."""
_OUT_OF_TIME = 128
_log = logging.getLogger("dist_pca.resilience")


class StopRequest:
    """A request to stop, by signal or time limit, and its reduction over ranks.

    The first SIGINT, SIGTERM or SIGUSR1 requests a checkpoint after the current step. Another one, more than
    `ECHO_SECONDS` later, ends this process at once, even inside a blocking call. So does the first one until the ranks
    have joined: nothing can be saved yet, and a rank may wait for another that will never come.
    """

    def __init__(self) -> None:
        """Handle signals from now on; only the main thread may call this."""
        self.reduced = self.step = 0
        self._joined = self._waiting = self._ignoring = False
        self._requested = threading.Event()
        self._number = 0
        self._deadline = float("inf")
        # Python runs handlers only once its main thread returns from a blocking call, which may be never. The number
        # is written into this pipe at once, and read by a thread.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _handled_by_thread)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def joined(self) -> None:
        """Save before ending from now on, as all ranks have joined and can agree on a step."""
        self._joined = True

    def ignore(self) -> None:
        """Ignore signals from now on, as the run is saved and what this process has left to write is short.

        A launcher sends SIGTERM to all ranks as soon as the first of them has exited.
        """
        self._ignoring = True

    def limit(self, seconds: float | None, environment: Mapping[str, str]) -> None:
        """Request a stop after this many seconds, or `SLURM_MARGIN` before SLURM ends the job, whichever is first."""
        ends = [time.time() + seconds] if seconds is not None else []
        if environment.get("SLURM_JOB_END_TIME", "").isdecimal():
            ends.append(int(environment["SLURM_JOB_END_TIME"]) - SLURM_MARGIN)
        self._deadline = min(ends, default=float("inf"))

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than until the first signal, which ends only that; returns whether there was one."""
        self._waiting = True
        try:
            return self._requested.wait(seconds)
        finally:
            self._waiting = False

    def any_rank(self, step: int, device: "torch.device") -> bool:
        """Whether any rank has a request to stop after step `step` (from 1). Collective."""
        # This import is slow, and signals are to be handled before it.
        import torch
        import torch.distributed as dist

        own = _OUT_OF_TIME if time.time() >= self._deadline else self._number
        request = torch.tensor(own, dtype=torch.int32, device=device)
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        self.reduced, self.step = int(request.item()), step
        return self.reduced != 0

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of a run that saves and exits on request."""
        return ExitCode.INTERRUPTED if self.reduced == signal.SIGINT else ExitCode.SAVED

    @property
    def reason(self) -> str:
        """The request that the ranks stop for: a signal's name, or `out of time`."""
        return "out of time" if self.reduced == _OUT_OF_TIME else signal.Signals(self.reduced).name

    def _listen(self, reader: int) -> None:
        first = 0.0
        while True:
            for number in os.read(reader, 64):
                if number not in SIGNALS or self._ignoring:
                    continue
                if not self._joined and not self._waiting:
                    # No exit.json: launchers also send this when another rank has failed, which is then the reason.
                    exit_process(None, ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.SAVED)
                if not self._requested.is_set():
                    self._number, first = number, time.monotonic()
                    self._requested.set()
                    if os.environ.get("RANK", "0") == "0":
                        name = signal.Signals(number).name
                        _log.info("%s: saving after this step; a second signal ends the run at once", name)
                elif time.monotonic() - first > ECHO_SECONDS:
                    os._exit(128 + number)


def _handled_by_thread(_number: int, _frame: object) -> None:
    pass
