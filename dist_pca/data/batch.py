"""Crops become batches, and batches leave loader processes through shared memory that is written again and again.

A fresh piece of shared memory for every batch costs a page fault for each of its pages, a tenth of what decoding costs.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from dist_pca.data.transform import Pixels

PREFETCH = 2
"""Batches that each loader process makes ahead."""


class Batch(NamedTuple):
    """One rank's micro-batch of m crops; in pinned memory where there is CUDA."""

    images: torch.Tensor
    """uint8, m x 3 x height x width, RGB."""
    labels: torch.Tensor | None
    """uint8 train ids, m x height x width; None where the shards have no labels."""
    keys: list[str]
    positions: list[int]
    """Where each sample stands in the endless stream."""
    skipped: list[str]
    """What was wrong with samples that others have replaced."""


class Cut(NamedTuple):
    """One crop."""

    image: Pixels
    """3 x height x width."""
    label: Pixels | None
    """Train ids, height x width."""
    key: str
    position: int
    skipped: list[str]


class Filled(NamedTuple):
    """Where in a ring a batch lies, and what it is made of."""

    worker: int
    place: int
    keys: list[str]
    positions: list[int]
    skipped: list[str]


class Ring:
    """Shared memory for the batches that lie ready in a stream's loader processes.

    A loader process is asked for one more batch whenever one of its batches was taken, so at most `PREFETCH` lie ready,
    and the one before these must have been copied out before the next is asked for: one place more is enough.
    """

    def __init__(self, workers: int, size: int, crop: tuple[int, int], *, labelled: bool) -> None:
        """Room for batches of `size` crops (height, width) from each of `workers` processes, or from this one."""
        # A stream without loader processes hands over each batch before it makes the next.
        places = (workers, PREFETCH + 1, size) if workers else (1, 1, size)
        self.images = _shared(*places, 3, *crop)
        self.labels = _shared(*places, *crop) if labelled else None
        self.size = size

    def fill(self, crops: Iterator[Cut]) -> Iterator[Filled]:
        """Write every `size` crops to the next place of this loader process, and say which it is."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        images = self.images[worker].numpy()
        labels = None if self.labels is None else self.labels[worker].numpy()
        for number in count():
            place = number % len(images)
            # webdataset.batched would read the first sample of the next batch before it gives out this one.
            members = list(islice(crops, self.size))
            for index, crop in enumerate(members):
                images[place, index] = crop.image
                if labels is not None:
                    labels[place, index] = crop.label
            yield Filled(
                worker,
                place,
                keys=[crop.key for crop in members],
                positions=[crop.position for crop in members],
                skipped=[line for crop in members for line in crop.skipped],
            )

    def take(self, filled: Filled) -> Batch:
        """Copy a batch out of its place, which is written again once the next batch is asked for."""
        copy = torch.Tensor.pin_memory if torch.cuda.is_available() else torch.clone
        place = filled.worker, filled.place
        return Batch(
            copy(self.images[place]),
            None if self.labels is None else copy(self.labels[place]),
            keys=filled.keys,
            positions=filled.positions,
            skipped=filled.skipped,
        )


def _shared(*shape: int) -> torch.Tensor:
    memory = torch.empty(shape, dtype=torch.uint8)
    memory.share_memory_()  # type: ignore[no-untyped-call]
    return memory
