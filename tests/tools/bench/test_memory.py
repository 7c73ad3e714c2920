import sys

import pytest
import torch

from dist_pca.tools.bench.memory import available, peak_of, return_freed_memory_at_once
from dist_pca.tools.bench.processes import in_fresh_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, which only Linux has")

MIB = 1 << 20


def test_the_peak_counts_what_was_freed_again_and_not_what_was_there_before() -> None:
    there = torch.ones(64 * MIB // 4)

    def call() -> float:
        return float(torch.ones(96 * MIB // 4).sum() + there.sum())

    peak = peak_of(call, torch.device("cpu"))
    assert peak is not None
    # The system's counters lag behind by a few pages for each processor.
    assert 95 * MIB < peak < 128 * MIB


def test_memory_that_the_allocator_kept_from_before_is_counted_when_it_is_used_again() -> None:
    def call() -> int:
        # Small enough for the allocator to keep when they are freed.
        return sum(len(block) for block in [bytearray(b"x" * 65536) for _ in range(512)])

    peaks = [peak_of(call, torch.device("cpu")) for _ in range(2)]
    assert all(peak is not None and peak >= 24 * MIB for peak in peaks)


def peak_of_blocks_too_large_for_where_others_were_freed(_rank: int) -> int | None:
    return_freed_memory_at_once()

    def call() -> None:
        # Once such a block was freed, glibc keeps those up to its size in its heap.
        large = b"x" * (8 * MIB)
        del large
        pins = []
        for size in (4 * MIB, 5 * MIB):
            blocks = []
            for _ in range(8):
                blocks.append(b"x" * size)
                pins.append(b"y" * 50_000)
            del blocks

    return peak_of(call, torch.device("cpu"))


def test_memory_that_the_allocator_holds_back_does_not_count_as_in_use() -> None:
    (peak,) = in_fresh_processes(peak_of_blocks_too_large_for_where_others_were_freed, 1)
    assert peak is not None
    assert 39 * MIB < peak < 48 * MIB


def test_available_memory_is_less_than_a_machine_holds() -> None:
    there = available()
    assert there is not None
    assert 0 < there < 1 << 50
