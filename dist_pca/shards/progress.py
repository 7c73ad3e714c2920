"""Progress of a long job: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_pca.console import plain_console
from dist_pca.shards.pool import Progress as Tell

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(noun: str) -> Iterator[Tell]:
    """Yield a function that displays progress on stderr; `noun` names what is counted."""
    console = plain_console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        yield _lines(console, noun)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, speed="")
        start = time.perf_counter()

        def tell(done: int, total: int, stored: int) -> None:
            speed = f"{noun}, {_speed(noun, done, stored, time.perf_counter() - start)}, left"
            bar.update(task, completed=done, total=total, speed=speed)

        yield tell


def _lines(console: Console, noun: str) -> Tell:
    start = last = time.perf_counter()

    def tell(done: int, total: int, stored: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = f"{(total - done) * (now - start) / done:.0f} s left" if done else "time left not known yet"
        console.print(f"{done:,} of {total:,} {noun}, {_speed(noun, done, stored, now - start)}, {left}", markup=False)

    return tell


def _speed(noun: str, done: int, stored: int, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return f"{done / seconds:.0f} {noun}/s, {stored / seconds / 1e6:.1f} MB/s"
