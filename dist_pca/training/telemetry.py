"""What a run tells: a live line, `metrics.jsonl` and TensorBoard events. Rank 0 tells, all ranks contribute."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import Self

from dist_pca.shards.classes import ClassInfo

SHOWN = ("loss", "ce", "lovasz", "association_features", "association_predictions")


class Telemetry:
    """Collects the terms of every step and tells their means every `log_every` steps."""

    def __init__(
        self, folder: Path, classes: tuple[ClassInfo, ...], *, steps: int, start_step: int, log_every: int, images: int
    ) -> None:
        """Open the run folder's logs; lines of steps that are about to be made again are dropped.

        Args:
            folder: The run folder.
            classes: Names for per-class counts.
            steps: Last step.
            start_step: Steps already made.
            log_every: Steps between lines.
            images: Images per step over all ranks and both domains.
        """
        self.classes, self.steps, self.log_every, self.images = classes, steps, log_every, images
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.seconds, self.collected, self.waited = time.perf_counter(), 0, 0.0
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.first = dist.get_rank() == 0
        if self.first:
            _drop_lines_after(folder / "metrics.jsonl", start_step)
            self.lines = (folder / "metrics.jsonl").open("a")
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
            if self.console.is_terminal:
                self.progress = Progress(
                    TextColumn("[bold]train"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[summary]}"),
                    console=self.console,
                )
                self.task = self.progress.add_task("train", total=steps, completed=start_step, summary="")

    def __enter__(self) -> Self:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress:
            self.progress.stop()
        if self.first:
            self.lines.close()
            self.events.close()

    def collect(self, terms: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's terms; nothing leaves the device until a line is due. Only finite values count."""
        for name, value in terms.items():
            value = value.detach().double()
            defined = value.isfinite()
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + torch.where(defined, value, 0)
            self.counts[name] = self.counts.get(name, torch.zeros_like(value)) + defined

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as data wait."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self, step: int, scalars: dict[str, float | None]) -> None:
        """Tell step number `step` (from 1): a live update, and a line when one is due. Collective."""
        self.collected += 1
        if self.progress:
            self.progress.update(self.task, completed=step)
        if step % self.log_every and step != self.steps:
            return
        record: dict[str, object] = {"step": step, **scalars, **self._means()}
        elapsed = time.perf_counter() - self.seconds
        record["seconds_per_step"] = elapsed / self.collected
        record["images_per_second"] = self.images * self.collected / elapsed
        record["data_wait_share"] = self.waited / elapsed
        self.seconds, self.collected, self.waited = time.perf_counter(), 0, 0.0
        self.sums, self.counts = {}, {}
        if self.first:
            self._tell(step, record)

    def _means(self) -> dict[str, float | dict[str, float] | None]:
        means: dict[str, float | dict[str, float] | None] = {}
        for name, total in self.sums.items():
            # A term is this rank's share of a mean over ranks or the same everywhere; the mean over ranks suits both.
            value = total / self.counts[name].clamp(min=1)
            undefined = self.counts[name] == 0
            dist.all_reduce(value)
            value = torch.where(undefined, torch.nan, value / dist.get_world_size())
            if value.ndim:
                means[name] = {info.name: v for info, v in zip(self.classes, value.tolist(), strict=True)}
            else:
                means[name] = None if math.isnan(value.item()) else value.item()
        return means

    def _tell(self, step: int, record: dict[str, object]) -> None:
        self.lines.write(json.dumps(record) + "\n")
        self.lines.flush()
        for name, value in record.items():
            if isinstance(value, dict):
                for inner, count in value.items():
                    self.events.add_scalar(f"{name}/{inner}", count, step)
            elif isinstance(value, (int, float)) and name != "step":
                self.events.add_scalar(name, value, step)
        summary = self._summary(record)
        if self.progress:
            self.progress.update(self.task, summary=summary)
        else:
            self.console.print(f"step {step}/{self.steps}  {summary}", highlight=False, soft_wrap=True)

    def _summary(self, record: dict[str, object]) -> str:
        parts = [f"{name} {record[name]:.3f}" for name in SHOWN if isinstance(record.get(name), float)]
        for level in ("features", "predictions"):
            ratio = record.get(f"consistent_ratio_{level}")
            if isinstance(ratio, float):
                parts.append(f"{level} cycles {ratio:.0%} kept, {record[f'cover_ratio_{level}']:.0%} covered")
        rate = record["images_per_second"]
        seconds = float(str(record["seconds_per_step"])) * (self.steps - int(str(record["step"])))
        return "  ".join([*parts, f"{rate:.1f} images/s", f"{seconds / 60:.1f} min left"])


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            # The last line of a killed run can be cut short.
            continue
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(kept))
    aside.replace(path)
