from collections.abc import Generator
from contextlib import closing
from itertools import islice

import pytest
import torch

from dist_pca.data.collate import Batch
from dist_pca.data.to_device import one_ahead, to_device
from dist_pca.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def numbered(ended: list[int]) -> Generator[Batch, None, None]:
    try:
        number = 0
        while True:
            images = torch.full((2, 3, 64, 64), number, dtype=torch.uint8)
            yield Batch(images.pin_memory() if torch.cuda.is_available() else images, None, [str(number)], [number], [])
            number += 1
    finally:
        ended.append(number)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_whole_and_in_their_order(device: str) -> None:
    with closing(to_device(numbered([]), torch.device(device))) as batches:
        for number, batch in enumerate(islice(batches, 50)):
            assert (batch.images.device.type, batch.keys) == (device, [str(number)])
            assert bool((batch.images == number).all())


def broken_at(broken: int) -> Generator[Batch, None, None]:
    with closing(numbered([])) as batches:
        yield from islice(batches, broken)
    raise UserError(f"batch {broken}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [0, 1, 3])
def test_an_error_in_a_batch_is_raised_when_that_batch_is_asked_for(device: str, broken: int) -> None:
    batches = to_device(broken_at(broken), torch.device(device))
    assert [next(batches).keys for _ in range(broken)] == [[str(number)] for number in range(broken)]
    with pytest.raises(UserError, match=f"batch {broken}"):
        next(batches)


def test_items_are_fetched_one_ahead_and_an_error_waits_for_its_turn() -> None:
    fetched: list[int] = []

    def items(broken: int) -> Generator[int, None, None]:
        fetched.clear()
        for number in range(broken):
            fetched.append(number)
            yield number
        raise UserError("broken")

    for broken in (0, 1, 3):
        ahead = one_ahead(items(broken))
        for number in range(broken):
            assert next(ahead) == number
            assert fetched == list(range(min(number + 2, broken)))
        with pytest.raises(UserError, match="broken"):
            next(ahead)
    for length in (0, 1, 3):
        assert list(one_ahead(iter(range(length)))) == list(range(length))


@pytest.mark.parametrize("device", DEVICES)
def test_closing_ends_the_stream_behind(device: str) -> None:
    ended: list[int] = []
    batches = to_device(numbered(ended), torch.device(device))
    next(batches)
    batches.close()
    assert len(ended) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_falls_behind_still_reads_its_own_batch(device: str) -> None:
    # Host and GPU are not synchronised, so the GPU reads a batch long after the next ones are copied.
    work = torch.rand(2048, 2048, device=device) if device == "cuda" else torch.rand(8, 8)
    sums = []
    with closing(to_device(numbered([]), torch.device(device))) as batches:
        for batch in islice(batches, 30):
            for _ in range(20):
                work = (work @ work).clamp(0, 1)
            sums.append(batch.images.float().mean())
            del batch
    assert torch.stack(sums).tolist() == list(range(30))


@pytest.mark.gpu
def test_batches_are_copied_on_a_stream_beside_that_of_the_step() -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        with closing(to_device(numbered([]), torch.device("cuda"))) as batches:
            for batch in islice(batches, 5):
                batch.images.float().square().sum()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    copying, computing = (
        {event.device_resource_id for event in on_gpu if ("HtoD" in event.name) == copies} for copies in (True, False)
    )
    assert copying
    assert computing - copying
    assert not copying & computing
