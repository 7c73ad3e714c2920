import sys

import pytest
import torch

from dist_pca.bench.memory import available, peak_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20


def test_the_peak_counts_what_was_freed_again_and_not_what_was_there_before() -> None:
    there = torch.ones(64 * MIB // 4)

    def call() -> float:
        return float(torch.ones(96 * MIB // 4).sum() + there.sum())

    value, peak = peak_of(call, torch.device("cpu"))
    assert value == 40 * MIB
    assert peak is not None
    # The system's counters lag behind by a few pages for each processor.
    assert 95 * MIB < peak < 128 * MIB


def test_memory_that_the_allocator_kept_from_before_is_counted_when_it_is_used_again() -> None:
    def call() -> int:
        # Small enough for the allocator to keep when they are freed.
        return sum(len(block) for block in [bytearray(b"x" * 65536) for _ in range(512)])

    peaks = [peak_of(call, torch.device("cpu"))[1] for _ in range(2)]
    assert all(peak is not None and peak >= 24 * MIB for peak in peaks)


def test_available_memory_is_less_than_a_machine_holds() -> None:
    there = available()
    assert there is not None
    assert 0 < there < 1 << 50
