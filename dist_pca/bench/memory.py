"""How much memory a call takes at its peak, and how much there is."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def peak_of(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What a call returns, and the bytes above those in use before it; None where the system does not tell.

    On the CPU the call must be the process's first of its size: memory that an earlier one left with the allocator
    would be used again unseen. On a GPU it runs twice, because the first run compiles and tunes kernels in memory of
    their own, and torch's allocator counts what is in use, whatever it holds back.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if not _forget_high_water():
        return call(), None
    resident = _status_bytes("VmRSS")
    result = call()
    return result, max(0, _status_bytes("VmHWM") - resident)


def available() -> int | None:
    """Bytes that processes can still take on this machine's CPU side; None where the system does not tell."""
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
