"""Number of CPU cores that this process may use."""

import os


def usable_cores() -> int:
    """Count the cores that this process may use; a batch system may bind a job to fewer than the machine has."""
    # CPU affinity is available on Linux only.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
