"""Where in the loss a process is, told to whoever measures or watches it; nobody does unless `listen` was called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Phase = Literal["association", "exchange"]
"""`exchange` is waiting for other ranks."""

_enter: Callable[[Any], Any] | None = None


def listen(enter: Callable[[Any], Any] | None) -> None:
    """Call `enter` with each phase that begins; it gives the one that ends, and is called with that when it goes on."""
    global _enter
    _enter = enter


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Tell that a phase begins, and at the end that the one before goes on."""
    enter = _enter
    if enter is None:
        yield
        return
    before = enter(name)
    yield
    enter(before)
