"""Leaving on request: signals and wall-clock limits, and the step after which all ranks leave together."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dist_pca.training.outcome import ExitCode

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 2.0
"""SLURM signals every process of a step, and a launcher passes on what it gets: one request arrives several times."""
SLURM_MARGIN = 120.0
"""Seconds before SLURM's end of the job at which the run saves and leaves."""
_OUT_OF_TIME = 128


class StopRequest:
    """What this rank was asked for, and what all ranks have agreed on.

    The first SIGINT, SIGTERM or SIGUSR1 asks for a checkpoint after the step that is being made. Another one, more than
    `ECHO_SECONDS` later, ends this process at once, whatever it is waiting in.
    """

    def __init__(self) -> None:
        """Listen from now on; only the main thread may."""
        self.agreed = self.step = 0
        self._asked = threading.Event()
        self._number = 0
        self._deadline = float("inf")
        # Python runs a signal's handler when its main thread is back from whatever it waits in, which may be never.
        # The number is written into this pipe at once, and read by a thread.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _leave_it_to_the_thread)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def limit(self, seconds: float | None, environment: Mapping[str, str]) -> None:
        """Ask for the end this long from now, or `SLURM_MARGIN` before SLURM ends the job, whichever is first."""
        ends = [time.time() + seconds] if seconds is not None else []
        if environment.get("SLURM_JOB_END_TIME", "").isdecimal():
            ends.append(int(environment["SLURM_JOB_END_TIME"]) - SLURM_MARGIN)
        self._deadline = min(ends, default=float("inf"))

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the first signal."""
        self._asked.wait(seconds)

    def agree(self, step: int, device: "torch.device") -> bool:
        """Whether any rank was asked to stop after step number `step`. Collective."""
        # Signals are listened to before this slow import.
        import torch
        import torch.distributed as dist

        own = _OUT_OF_TIME if time.time() >= self._deadline else self._number
        asked = torch.tensor(own, dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.agreed, self.step = int(asked.item()), step
        return self.agreed != 0

    @property
    def exit_code(self) -> ExitCode:
        """Of a run that has saved and leaves."""
        return ExitCode.INTERRUPTED if self.agreed == signal.SIGINT else ExitCode.SAVED

    @property
    def reason(self) -> str:
        """What the ranks have agreed to leave for."""
        return "out of time" if self.agreed == _OUT_OF_TIME else signal.Signals(self.agreed).name

    def _listen(self, reader: int) -> None:
        first = 0.0
        while True:
            for number in os.read(reader, 64):
                if number not in SIGNALS:
                    continue
                if not self._asked.is_set():
                    self._number, first = number, time.monotonic()
                    self._asked.set()
                elif time.monotonic() - first > ECHO_SECONDS:
                    os._exit(128 + number)


def _leave_it_to_the_thread(_number: int, _frame: object) -> None:
    pass
