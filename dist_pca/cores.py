"""How many cores there are to work on."""

import os


def usable_cores() -> int:
    """Cores that this process may use: a batch system binds a job to fewer than the machine has."""
    # Linux alone binds processes to cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
