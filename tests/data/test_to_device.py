from collections.abc import Generator
from contextlib import closing
from itertools import islice

import pytest
import torch

from dist_pca.data.collate import Batch
from dist_pca.data.to_device import to_device

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


@pytest.mark.parametrize("device", DEVICES)
def test_closing_ends_the_stream_behind(device: str) -> None:
    ended: list[int] = []
    batches = to_device(numbered(ended), torch.device(device))
    next(batches)
    batches.close()
    assert len(ended) == 1
