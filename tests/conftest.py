"""Settings of all tests."""

import os

# Before PyTorch is loaded: processes that test side by side have a core each, and threads that wait for a core spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# No assertion is timed: a loaded machine is slow without being wrong.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, or `gpu(count)`, where there are fewer CUDA GPUs."""
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        mark = item.get_closest_marker("gpu")
        needed = 0 if mark is None else int(mark.args[0]) if mark.args else 1
        if needed > present:
            reason = (
                f"needs {needed} CUDA GPU{'s' * (needed > 1)}, and there {'is' if present == 1 else 'are'} {present}"
            )
            item.add_marker(pytest.mark.skip(reason=reason))
