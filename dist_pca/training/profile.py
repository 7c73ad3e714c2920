"""Profiler traces of a few steps, for chrome://tracing and Perfetto."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from dist_pca.config import TelemetryConfig
from dist_pca.errors import UserError
from dist_pca.training.phases import PhaseClock

_log = logging.getLogger("dist_pca.training")


class Profile:
    """Traces the steps that a config selects, on every rank, into the run folder's `profile`."""

    def __init__(self, config: TelemetryConfig, folder: Path, clock: PhaseClock) -> None:
        """Select the steps to trace.

        Args:
            config: Selects the steps.
            folder: The run folder.
            clock: Labels phases in the trace.
        """
        self._first = config.profile_start
        self._after = 0 if self._first is None else self._first + config.profile_steps
        self._folder, self._clock = folder / "profile", clock
        self._trace: profile | None = None
        self._last = 0

    def before(self, step: int) -> None:
        """Start or end the trace before step `step` (from 1).

        Raises:
            UserError: the trace cannot be written.
        """
        self._last = step - 1
        if step == self._first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._trace = profile(activities=activities, record_shapes=True)
            self._trace.start()
            self._clock.labelled = True
        elif step == self._after:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is running."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        self._clock.labelled = False
        trace.stop()
        file = self._folder / f"steps-{self._first}-{self._last}.rank{dist.get_rank()}.json.gz"
        try:
            file.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(file))
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error}); make room there, or drop --profile") from error
        if dist.get_rank() == 0:
            _log.info("trace of steps %d to %d: %s; open it in ui.perfetto.dev", self._first, self._last, file)
