"""Which files of the package a call runs through: what a reader has to open to follow it."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import dist_pca

PACKAGE = Path(dist_pca.__file__).parent


def files_run(call: Callable[[], object]) -> set[str]:
    """Files, relative to the package, of which a function is entered during the call in this thread."""
    names: set[str] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            names.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {
        str(Path(name).relative_to(PACKAGE))
        for name in names
        if Path(name).is_absolute() and PACKAGE in Path(name).parents
    }
