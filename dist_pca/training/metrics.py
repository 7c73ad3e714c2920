"""Logging of metrics: the terminal, `metrics.jsonl`, and the trackers. Rank 0 logs, all ranks contribute.

A line of `metrics.jsonl` is one JSON object with the fields of `METRICS`, every `training.log_every` steps. Terms are
means over the steps since the line before, over their micro-batches and over ranks; null is a mean of nothing.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Self

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.config.aliases import rename_metrics
from dist_pca.data.collate import Batch
from dist_pca.files import append_line, drop_lines_after
from dist_pca.training.loggers import SampleLog, Trackers
from dist_pca.training.profiling import PhaseClock, Profile, network_passes, peak_flops, peak_memory
from dist_pca.training.terminal import RunTerminal

METRICS = {
    "step": "updates made, the skipped ones too",
    "learning_rate": "learning rate of the backbone in the last step",
    "gradient_norm": "gradient norm of the last step before clipping; null if it was skipped",
    "loss_scale": "what fp16's losses are multiplied by in the next step; 1 at another precision",
    "skipped_share": "share of steps skipped because a loss or gradient was not finite",
    "loss": "what is minimised",
    "ce": "cross-entropy of the source, nats",
    "dice": "soft Dice loss of the source",
    "lovasz": "Lovasz-Softmax of the source",
    "source_contrast": "InfoNCE of the source's pixels, nats",
    "class_statistics": "InfoNCE of both domains' pixels with the distributions of all classes, nats",
    "feature_distance": "distance of the features at source pixels of thing classes to the pretrained backbone's",
    "smoothness_source, smoothness_target": "label smoothness of each domain",
    "self_training": "cross-entropy of mixed images with pseudo labels, weighted by `confident_share`",
    "masked_consistency": "cross-entropy of target images with hidden blocks, with the same labels and weight",
    "confident_share": "share of target pixels whose pseudo label reaches `objective.self_training.threshold`",
    "pseudo_label_accuracy": "share of pseudo labels that are true; only where target shards have labels",
    "association_LEVEL": "association loss at `features` or `predictions`, nats",
    "kept_LEVEL": "cycles kept",
    "kept_per_class_LEVEL": "cycles kept, by class name",
    "cover_ratio_LEVEL": "share of target pixels that some source pixel matched",
    "consistent_ratio_LEVEL": "share of labelled source pixels whose cycle is consistent: it ends in their own class",
    "kept_ratio_LEVEL": "share of labelled source pixels whose cycle is kept: it is consistent and, with "
    "`teacher_check`, the teacher predicts the same class at the matched target pixel",
    "correct_ratio_LEVEL": "share of matches whose target truly has the source's class; only where target shards have "
    "labels, which never reach the loss. Where association is off or has not begun, matches are judged at logged steps "
    "alone, and only if the student sees target images in their own colours",
    "kept_correct_ratio_LEVEL": "share of kept cycles whose matched target pixel truly has the source's class",
    "confusion_LEVEL": "matches by class: `source class → true class of the matched target pixel`; where that is known",
    "kept_confusion_LEVEL": "`confusion_LEVEL` of kept cycles alone",
    "mutual_information_bound_LEVEL": "InfoNCE's lower bound on mutual information: `ln N_source + ln N_target - loss` "
    "nats. The loss itself grows with the number of candidates and compares only at equal numbers",
    "communication_bytes_LEVEL": "bytes of keys, matches and gradients that a rank sends to others in one update",
    "validation_mean_iou": "mIoU on `data.validation`, in the steps that are validated",
    "validation_iou": "IoU of each class there, by class name; null for a class that does not occur",
    "seconds_per_step": "wall time",
    "seconds": "the same by phase: `data` (waiting for it), `teacher` (its forward pass, and making "
    "views), `forward`, `association`, of it `communication` (waiting "
    "for other ranks), `backward`, `optimizer`, `validation`, `checkpoint`, `log`; mean over ranks",
    "data_wait_share": "share of the time that waits for data",
    "images_per_second": "of both domains, over all ranks",
    "flops_per_second": "the network's forward and backward operations, on each rank",
    "flop_utilisation": "the same over the GPU's peak rate at `training.precision`; null where that is not known",
    "peak_memory_bytes": "highest so far on any rank: tensors on a GPU, on a CPU all that is resident",
}
"""Every field of a line and what it is; LEVEL is `features` or `predictions`."""
METRIC_UNITS = {
    name: unit
    for unit, names in {
        "updates": ("step",),
        "nats": (
            *("ce", "source_contrast", "class_statistics", "smoothness_source, smoothness_target"),
            *("self_training", "masked_consistency"),
            *("association_LEVEL", "mutual_information_bound_LEVEL"),
        ),
        "cycles": ("kept_LEVEL", "kept_per_class_LEVEL"),
        "matches": ("confusion_LEVEL", "kept_confusion_LEVEL"),
        "0 to 1": (
            *("skipped_share", "confident_share", "pseudo_label_accuracy", "cover_ratio_LEVEL"),
            *("consistent_ratio_LEVEL", "kept_ratio_LEVEL", "correct_ratio_LEVEL", "kept_correct_ratio_LEVEL"),
            *("validation_mean_iou", "validation_iou", "data_wait_share", "flop_utilisation"),
        ),
        "s": ("seconds_per_step", "seconds"),
        "images/s": ("images_per_second",),
        "FLOP/s": ("flops_per_second",),
        "bytes": ("communication_bytes_LEVEL", "peak_memory_bytes"),
    }.items()
    for name in names
}
"""Unit of a field; a field that is not here is a pure number."""
TIMING = (
    *("seconds_per_step", "seconds", "data_wait_share", "images_per_second"),
    *("flops_per_second", "flop_utilisation", "peak_memory_bytes"),
)
"""Fields that differ between two runs of the same computation."""
PHASES = (
    *("data", "teacher", "forward", "association", "communication", "backward"),
    *("optimizer", "validation", "checkpoint", "log"),
)
CONFUSIONS = tuple(
    f"{kind}_{level}" for kind in ("confusion", "kept_confusion") for level in ("features", "predictions")
)
"""Terms with a value for each pair of classes, too many for trackers."""
MAX_PENDING = 64
"""Micro-batches whose terms are kept on the device before they are added up."""

Window = dict[str, tuple[float, float]]
"""Sum and count of every term since the last line, on one rank."""


class MetricsLogger:
    """Accumulates the terms of every step and logs their means every `log_every` steps."""

    def __init__(
        self,
        config: RunConfig,
        classes: tuple[ClassInfo, ...],
        clock: PhaseClock,
        *,
        device: torch.device,
        start_step: int,
        flops: int,
        saved: list[Window],
    ) -> None:
        """Open the run folder's logs, and drop lines of steps that are about to be trained again.

        Args:
            config: The run.
            classes: Names for per-class counts.
            clock: Measures the phases of this rank's steps.
            device: The network's.
            start_step: Steps already trained.
            flops: The network's floating-point operations for one image, forward and backward.
            saved: The `state` at `start_step`.

        Raises:
            UserError: a tracker does not start.
        """
        self._classes, self._clock, self._device = classes, clock, device
        self._steps, self._start_step, self._log_every = config.training.steps, start_step, config.training.log_every
        self._images = config.training.source_batch + (config.training.target_batch if config.objective.adapt else 0)
        self._passes = network_passes(config)
        self._flops, self._peak_flops = flops, peak_flops(device, config.training.precision)
        self._window = _restored(saved)
        self._pending: list[dict[str, torch.Tensor]] = []
        self._began = self._since = time.perf_counter()
        self._step, self._logged_step = start_step, start_step
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._profile = Profile(config.telemetry, config.folder, clock)
        self._samples = SampleLog(config.folder, start_step) if config.telemetry.sample_keys else None
        self._is_rank0 = dist.get_rank() == 0
        if not self._is_rank0:
            return
        self._file = config.folder / "metrics.jsonl"
        drop_lines_after(self._file, start_step)
        self._trackers = Trackers(config, start_step)
        self._terminal = RunTerminal(config, clock, start_step)

    def __enter__(self) -> Self:
        if self._is_rank0:
            self._terminal.__enter__()
        self._clock.take()
        self._began = self._since = time.perf_counter()
        self._profile.before(self._step + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._profile.close()
        if self._is_rank0:
            self._terminal.__exit__()
            self._trackers.close()
            if error is None and self._step > self._start_step:
                self._log_time_by_phase()

    def accumulate(self, terms: Mapping[str, torch.Tensor], batches: Iterable[Batch | None]) -> None:
        """Add a micro-batch's terms, and its source and target batch.

        Terms stay on the device until a line is due. Values that are not finite do not count.
        """
        if self._samples is not None:
            self._samples.accumulate(batches)
        self._pending.append({name: value.detach() for name, value in terms.items()})
        if len(self._pending) == MAX_PENDING:
            self._reduce_pending()

    def log(self, step: int, scalars: Mapping[str, float | None], *, skipped: bool) -> None:
        """Log step `step` (from 1): show it, and write a line if one is due. Collective.

        Raises:
            UserError: on rank 0, a line cannot be written.
        """
        self._step = step
        self._add("skipped_share", float(skipped))
        if self._samples is not None:
            self._samples.write(step)
        self._profile.before(step + 1)
        if step % self._log_every == 0 or step == self._steps:
            record = {"step": step, **scalars, **self._means(), **self._throughput()}
            if self._is_rank0:
                self._write(step, record)

    def log_pictures(self, pictures: Mapping[str, Any], step: int) -> None:
        """Log RGB images (height x width x 3, uint8) of step `step` (from 1) to the trackers; on rank 0 alone."""
        self._trackers.log_pictures(pictures, step)

    def state(self) -> list[Window]:
        """Replace this rank's terms since the last line by their mean over ranks, which a checkpoint saves. Collective.

        The run continues from the mean whether it is resumed or not, so a checkpoint needs no window of every rank.
        """
        ranks = dist.get_world_size()
        self._window = {name: (total / ranks, count / ranks) for name, (total, count) in self._totals().items()}
        return [self._window]

    def _totals(self) -> Window:
        """The window summed over ranks. Collective."""
        self._reduce_pending()
        totals = self._sum_over_ranks([number for pair in self._window.values() for number in pair])
        return dict(zip(self._window, zip(totals[::2], totals[1::2], strict=True), strict=True))

    def _add(self, name: str, value: float) -> None:
        total, count = self._window.get(name, (0.0, 0))
        self._window[name] = (total + value, count + 1)

    def _reduce_pending(self) -> None:
        """Add pending terms to the window in order, so that sums do not depend on when this is called."""
        if not self._pending:
            return
        values = iter(torch.cat([v.reshape(-1) for terms in self._pending for v in terms.values()]).tolist())
        for terms in self._pending:
            for name, term in terms.items():
                for one in self._names(name, term.ndim):
                    value = next(values)
                    if math.isfinite(value):
                        self._add(one, value)
                    else:
                        self._window.setdefault(one, (0.0, 0))
        self._pending = []

    def _names(self, name: str, dimensions: int) -> list[str]:
        """Names of a term's values: a scalar, one for each class [C], or one for each pair of classes [C, C]."""
        classes = [info.name for info in self._classes]
        if dimensions == 2:
            return [f"{name}/{row} → {column}" for row in classes for column in classes]
        return [f"{name}/{of_class}" for of_class in classes] if dimensions else [name]

    def _means(self) -> dict[str, Any]:
        """Means over the window and ranks.

        A term is either a rank's summand of a mean over ranks or equal on all ranks; the mean is right for both.
        """
        means: dict[str, Any] = {}
        for name, (total, count) in self._totals().items():
            outer, _, inner = name.partition("/")
            mean = total / count if count else None
            if inner:
                values = means.setdefault(outer, {})
                # Most pairs of classes have no matches.
                if outer not in CONFUSIONS or mean:
                    values[inner] = mean
            else:
                means[name] = mean
        self._window = {}
        return means

    def _throughput(self) -> dict[str, Any]:
        now, steps = time.perf_counter(), self._step - self._logged_step
        elapsed, self._since, self._logged_step = now - self._since, now, self._step
        own = self._take_seconds()
        ranks = dist.get_world_size()
        seconds = {
            phase: total / ranks / steps
            for phase, total in zip(own, self._sum_over_ranks(list(own.values())), strict=True)
        }
        peak = torch.tensor(peak_memory(self._device), device=self._device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        rate = self._images * steps / elapsed
        flops = self._flops * self._passes * steps / elapsed / ranks
        return {
            "seconds_per_step": elapsed / steps,
            "seconds": seconds,
            "data_wait_share": seconds["data"] * steps / elapsed,
            "images_per_second": rate,
            "flops_per_second": flops,
            "flop_utilisation": None if self._peak_flops is None else flops / self._peak_flops,
            "peak_memory_bytes": int(peak),
        }

    def _take_seconds(self) -> dict[str, float]:
        """Seconds of this rank in each phase since the last call; `association` includes `communication`."""
        taken = self._clock.take()
        taken["association"] = taken.get("association", 0.0) + taken.get("communication", 0.0)
        own = {phase: taken.get(phase, 0.0) for phase in PHASES}
        self._seconds = {phase: self._seconds[phase] + seconds for phase, seconds in own.items()}
        return own

    def _sum_over_ranks(self, numbers: list[float]) -> list[float]:
        totals = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(totals)
        summed: list[float] = totals.tolist()
        return summed

    def _write(self, step: int, record: dict[str, Any]) -> None:
        append_line(self._file, json.dumps(record))
        scalars = {name: value for name, value in record.items() if name != "step" and name not in CONFUSIONS}
        self._trackers.log(dict(_flat(scalars)), step)
        self._terminal.print_record(record)

    def _log_time_by_phase(self) -> None:
        self._take_seconds()
        elapsed, steps = time.perf_counter() - self._began, self._step - self._start_step
        shares = [
            f"{'of it ' if phase == 'communication' else ''}{phase} {seconds / elapsed:.0%}"
            for phase, seconds in self._seconds.items()
            if seconds >= 0.005 * elapsed
        ]
        self._terminal.print_line(
            f"steps {self._start_step + 1} to {self._step} in {elapsed / 60:.1f} min, {elapsed / steps:.3g} s each, "
            f"{self._images * steps / elapsed:.1f} images/s: {', '.join(shares)}"
        )


def _restored(windows: list[Window]) -> Window:
    """Take the mean of the saved windows, or this rank's where there is one of each, as older checkpoints have."""
    windows = [rename_metrics(window) for window in windows]
    ranks = dist.get_world_size()
    if len(windows) == ranks:
        return {name: (total, count) for name, (total, count) in windows[dist.get_rank()].items()}
    return {
        name: (
            sum(window[name][0] for window in windows) / len(windows),
            sum(window[name][1] for window in windows) / len(windows),
        )
        for name in (windows[0] if windows else {})
    }


def _flat(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Flatten a record; nested numbers are named `outer/inner`."""
    numbers = []
    for name, value in record.items():
        inner = {f"{name}/{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        numbers += [(key, one) for key, one in inner.items() if one is not None]
    return numbers
