"""Which files of the package some code runs through: what a reader has to open to follow it."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import dist_pca

PACKAGE = Path(dist_pca.__file__).parent


@contextmanager
def recorded_files() -> Iterator[set[str]]:
    """Yield a set that has, once the context is left, the files of which a function was entered inside.

    Names are relative to the package. Threads that were started inside count too.
    """
    entered: set[str] = set()
    files: set[str] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        files |= {str(Path(name).relative_to(PACKAGE)) for name in entered if PACKAGE in Path(name).parents}


def files_run(call: Callable[[], object]) -> set[str]:
    """Files, relative to the package, of which a function is entered during the call."""
    with recorded_files() as files:
        call()
    return files
