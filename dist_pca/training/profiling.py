"""Where time goes, traces of a few steps, and what the device could do: phases, profiler, throughput and memory."""

import logging
import re
import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from dist_pca.association.candidates import listen
from dist_pca.config import RunConfig, TelemetryConfig
from dist_pca.errors import UserError
from dist_pca.resilience.watchdog import Phase, Watchdog

_log = logging.getLogger("dist_pca.training")
PEAK_TERAFLOPS = {
    "GB200": (2500.0, 1250.0),
    "B200": (2250.0, 1100.0),
    "GH200": (989.4, 494.7),
    "H200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "A30": (165.0, 82.0),
    "A10": (125.0, 62.5),
    "A10G": (70.0, 35.0),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "V100": (125.0, 15.7),
    "V100S": (130.0, 16.4),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "RTX A6000": (154.8, 77.4),
    "MI300X": (1307.4, 653.7),
}
"""Dense peak rates by whole words of the device's name, the most specific first: of half precision accumulated in fp32,
and of fp32 as PyTorch convolves it by default, which is TF32 where the device has it."""
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
        self.current: tuple[Phase, float] = ("start", time.monotonic())
        """The phase, and when it began by `time.monotonic`; another thread may read it."""
        self.step = 0
        """The step of that phase, from 1; another thread may read it."""
        self._seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, Any]] = deque()
        self._spare: list[Any] = []
        self._since = time.perf_counter()
        self._label: record_function | None = None
        self._mark("start")

    def __enter__(self) -> Self:
        listen(self.enter)
        return self

    def __exit__(self, *_: object) -> None:
        listen(None)

    def enter(self, phase: Phase, step: int | None = None) -> Phase:
        """Start a phase of step `step` (from 1), or of the current step; return the phase that ends."""
        before, _ = self.current
        if phase != before:
            self.current = (phase, time.monotonic())
        if step is not None:
            self.step = step
        self._watchdog.enter(phase, step)
        self._mark(before)
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        if self.labelled:
            self._label = record_function(phase)
            self._label.__enter__()  # type: ignore[no-untyped-call]
        return before

    def take(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self._mark(self.current[0])
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


def network_flops(model: torch.nn.Module, bands: int, height: int, width: int) -> int:
    """Count floating-point operations of a forward and backward pass over one image [bands, height, width].

    Convolutions and matrix products count, on meta tensors, which takes no memory and a fraction of a second.
    Recomputation by activation checkpointing does not count.
    """
    meta = {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    image = torch.empty(1, bands, height, width, device="meta")
    # In evaluation mode, since synchronised batch norm would communicate.
    training = model.training
    model.eval()
    # Recomputation would run in backward, after the module's own tensors have replaced the meta tensors.
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    for module in checkpointed:
        module.grad_checkpointing = False
    try:
        with FlopCounterMode(display=False) as counter:
            output = torch.func.functional_call(model, meta, (image,))
            output.logits.sum().backward()
    finally:
        model.train(training)
        for module in checkpointed:
            module.grad_checkpointing = True
    return int(counter.get_total_flops())


def network_passes(config: RunConfig) -> float:
    """Number of forward and backward passes of single images in one update, over all ranks.

    Each of the student's views counts as one; a pass of the teacher, or one for running statistics alone, counts as a
    third, as it is forward only.
    """
    objective, training = config.objective, config.training
    if not objective.adapt:
        return training.source_batch
    views = objective.shows_target + (objective.self_training.weight > 0) + (objective.masked_consistency.weight > 0)
    taught = training.target_batch if objective.uses_teacher else 0
    if objective.shows_source_to_teacher:
        taught += training.source_batch
    if config.model.running_statistics == "target" and not objective.shows_target:
        taught += training.target_batch
    return training.source_batch + views * training.target_batch + taught / 3


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak operations per second of a device at fp32, bf16 or fp16; None if unknown, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # An RTX A4000 is no A40, and an A10G no A10.
    rates = next((rates for words, rates in PEAK_TERAFLOPS.items() if re.search(rf"\b{words}\b", name, re.I)), None)
    return None if rates is None else 1e12 * rates[precision == "fp32"]


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, and on macOS bytes.
    return peak if sys.platform == "darwin" else 1024 * peak
