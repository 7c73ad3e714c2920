"""What a run prints while it trains: a live view on a terminal, and elsewhere a plain line for each record.

The live view stands below the cursor, which stays visible on an empty row above it. What other ranks, the launcher or
the shell print therefore lands where the next line belongs, and however this process ends, the terminal stays usable. A
thread draws, so that training never waits for the terminal; all that it draws is on the host already.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import Self

from dist_pca.config import RunConfig
from dist_pca.console import ERASE_BELOW, duration, has_cursor, plain_console
from dist_pca.files import read_lines
from dist_pca.training.profiling import PhaseClock

WIDTH = 80
"""Columns that the live view takes at most."""
SECONDS_BETWEEN_FRAMES = 0.5
SECONDS_TO_CLOSE = 2.0
LONG_PHASE_SECONDS = 2.0
"""Time after which the view names the phase that lasts."""
SUMMARY_TERMS = ("loss", "ce", "dice", "lovasz", "self_training", "association_features", "association_predictions")
WAITS = {
    "data": "waiting for data",
    "communication": "waiting for other ranks",
    "validation": "validating",
    "checkpoint": "saving a checkpoint",
}
"""Phases for which the view has other words than their name."""


class RunTerminal:
    """Prints the progress of a run on stderr while its context is open; rank 0 has one."""

    def __init__(self, config: RunConfig, clock: PhaseClock, start_step: int) -> None:
        """Choose between the live view and plain lines.

        Args:
            config: The run, in whose folder `metrics.jsonl` has the validations until `start_step`.
            clock: Knows the phase and the step of this rank.
            start_step: Steps already trained.
        """
        self._console = plain_console(stderr=True)
        self._live = has_cursor(self._console)
        self._clock = clock
        self._steps, self._start_step, self._recorded_step = config.training.steps, start_step, start_step
        scaling = config.schedule.batch_scaling
        self._scaling = None if scaling == "none" else f"{scaling} in {config.training.source_batch} images"
        self._record: Mapping[str, Any] | None = None
        self._scores: list[tuple[float, int]] = []
        for _, record in read_lines(config.folder / "metrics.jsonl"):
            self._add_score(record)
        self._began = time.monotonic()
        self._closed = threading.Event()
        self._drawing = threading.Thread(target=self._draw_until_closed, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._live:
            self._drawing.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._closed.set()
            # Ctrl-S on the terminal holds the thread.
            self._drawing.join(SECONDS_TO_CLOSE)
            if not self._drawing.is_alive():
                with suppress(OSError):
                    self._draw(last=True)

    def print_record(self, record: Mapping[str, Any]) -> None:
        """Print a line of `metrics.jsonl`, or show it in the live view."""
        self._add_score(record)
        self._record, self._recorded_step = record, int(record["step"])
        if not self._live:
            validated = [
                f"validation mIoU {100 * score:.1f}" for score, step in self._scores[-1:] if step == self._step
            ]
            left = f"{duration(self._seconds_left())} left"
            parts = [*self._terms(record), *validated, *self._rates(record), left]
            self.print_line(f"step {self._step}/{self._steps}  {'  '.join(parts)}")

    def print_line(self, line: str) -> None:
        """Print a line; after the context is closed if there is a live view."""
        self._console.print(line, soft_wrap=True)

    def _add_score(self, record: Mapping[str, Any]) -> None:
        score = record.get("validation_mean_iou")
        if isinstance(score, float):
            self._scores.append((score, int(record["step"])))

    @property
    def _step(self) -> int:
        """Steps that are done."""
        return max(self._recorded_step, self._clock.step - 1)

    def _seconds_per_step(self) -> float:
        """Seconds of a step in the last record; before there is one, since the start."""
        if self._record is not None:
            return float(self._record["seconds_per_step"])
        return (time.monotonic() - self._began) / max(1, self._step - self._start_step)

    def _seconds_left(self) -> float:
        return self._seconds_per_step() * (self._steps - self._step)

    def _terms(self, record: Mapping[str, Any]) -> Iterator[str]:
        for name in SUMMARY_TERMS:
            if isinstance(record.get(name), float):
                yield f"{name} {record[name]:.3f}"
        for level in ("features", "predictions"):
            ratio = record.get(f"kept_ratio_{level}")
            if isinstance(ratio, float):
                yield f"{level} cycles {ratio:.0%} kept, {record[f'cover_ratio_{level}']:.0%} covered"

    def _rates(self, record: Mapping[str, Any]) -> Iterator[str]:
        if self._scaling is not None:
            yield f"learning rate {record['learning_rate']:.2g}, {self._scaling}"
        yield f"{record['images_per_second']:.1f} images/s"
        if record["flop_utilisation"] is not None:
            yield f"{record['flop_utilisation']:.0%} of peak"

    def _draw_until_closed(self) -> None:
        # Where the terminal is closed, the run continues without a view.
        with suppress(OSError):
            while not self._closed.wait(SECONDS_BETWEEN_FRAMES):
                self._draw()

    def _draw(self, *, last: bool = False) -> None:
        """Draw the view anew, in one write; the last one stays, with the cursor below it."""
        width = min(WIDTH, self._console.width - 1)
        with self._console.capture() as captured:
            for row in self._rows(width):
                self._console.print(row, width=width, no_wrap=True, overflow="ellipsis")
        rows = captured.get().splitlines()[: max(1, self._console.height - 1)]
        text = "\n".join([*rows, ""]) if last else "\n".join(["", *rows]) + f"\r\x1b[{len(rows)}A"
        # A loader process that is forked meanwhile inherits no lock of stderr's buffer.
        os.write(self._console.file.fileno(), (ERASE_BELOW + text).encode())

    def _rows(self, width: int) -> Iterator[RenderableType]:
        done = self._step - self._start_step
        left = duration(self._seconds_left()) + " left" if done and self._step < self._steps else ""
        bar = Table.grid(Column(), Column(ratio=1), Column(), padding=(0, 2, 0, 0), expand=True)
        bar.add_row(
            Text(f"step {self._step}/{self._steps}", "bold"), ProgressBar(self._steps, self._step), Text(left, "cyan")
        )
        yield bar
        record = self._record
        speed = [f"{self._seconds_per_step():.3g} s per step"] if done else []
        phase, began = self._clock.current
        lasts = time.monotonic() - began
        waits = [] if lasts < LONG_PHASE_SECONDS else [f"{WAITS.get(phase, phase)}, {duration(lasts)}"]
        yield Text("  ").join(
            [*map(Text, speed), *map(Text, self._rates(record) if record else ()), *(Text(w, "yellow") for w in waits)]
        )
        row = ""
        for term in self._terms(record) if record else ():
            if row and len(row) + 2 + len(term) > width:
                yield Text(row)
                row = ""
            row += "  " * bool(row) + term
        yield Text(row)
        if self._scores:
            (score, step), (best, best_step) = self._scores[-1], max(self._scores, key=lambda one: one[0])
            yield Text(f"validation mIoU {100 * score:.1f} in step {step}, best {100 * best:.1f} in step {best_step}")
