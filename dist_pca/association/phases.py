"""Phases of the loss, reported to a profiler or watchdog if one has registered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Phase = Literal["association", "exchange"]
"""`exchange` is communication with other ranks."""

_enter: Callable[[Any], Any] | None = None


def listen(enter: Callable[[Any], Any] | None) -> None:
    """Register a callback `enter(new_phase) -> old_phase`; None removes it."""
    global _enter
    _enter = enter


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Report that a phase begins, and at the end that the previous one resumes."""
    enter = _enter
    if enter is None:
        yield
        return
    previous = enter(name)
    yield
    enter(previous)
