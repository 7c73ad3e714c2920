"""How much memory a call takes at its peak, and how much there is."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of a call above that in use before it, in bytes; None if the system does not report it.

    On the CPU the call must be the process's first of its size: memory that an earlier one left with the allocator
    would be used again unseen. On a GPU it runs twice, because the first run compiles and tunes kernels in memory of
    their own, and torch's allocator counts what is in use, whatever it holds back.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _forget_high_water():
        return None
    resident = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - resident)


def return_freed_memory_at_once() -> None:
    """From now on blocks of 64 KiB or more go back to the system when they are freed, where the C library is glibc.

    Left to itself it keeps some of them, more or fewer by chance, and a peak would count these with what is in use.
    It makes allocation slower: not for a process whose time is taken.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def available() -> int | None:
    """Available CPU memory of this machine, in bytes; None if the system does not report it."""
    file = Path("/proc/meminfo")
    return _field_bytes(file, "MemAvailable") if file.is_file() else None


def _forget_high_water() -> bool:
    """Hand free memory back and let VmHWM start from what is resident; False where the system has no such thing."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _status_bytes(field: str) -> int:
    return _field_bytes(Path("/proc/self/status"), field)


def _field_bytes(file: Path, field: str) -> int:
    lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
