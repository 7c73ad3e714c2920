"""Cores, memory and shared memory that this process may use; containers and batch systems may allow less than there is.

Limits of control groups are read of version 2 and of version 1.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Count the cores that this process may use; a batch system may bind a job to fewer than the machine has."""
    # CPU affinity is available on Linux only.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in _cpu_quotas():
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def available_memory() -> int:
    """Bytes of memory that are free, or that the limit of a container leaves."""
    free: int = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for folder in _folders("memory"):
            with suppress(OSError, ValueError):
                # Pages of files that were read count as used, and are given back.
                cache = _field(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
                left = int((folder / limit).read_text()) - int((folder / used).read_text()) + cache
                free = min(free, max(0, left))
    return free


def free_shared_memory() -> int | None:
    """Bytes of shared memory that are free; None where there is no such file system."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def _cpu_quotas() -> list[tuple[str, str]]:
    """Microseconds of computing time in each period of so many microseconds, as text; `max` is no limit."""
    quotas = []
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append((quota, period))
        with suppress(OSError):
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            quotas.append((quota, (folder / "cpu.cfs_period_us").read_text().strip()))
    return quotas


def _folders(controller: str) -> list[Path]:
    """Folders of the control groups of this process, with their parents: the tightest limit holds."""
    folders = [CONTROL_GROUPS, CONTROL_GROUPS / controller]
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
                group = root / path.strip("/")
                folders += [parent for parent in (group, *group.parents) if parent.is_relative_to(root)]
    return list(dict.fromkeys(folders))


def _field(file: Path, names: tuple[str, ...]) -> int:
    values = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
    return max(int(values.get(name, 0)) for name in names)
