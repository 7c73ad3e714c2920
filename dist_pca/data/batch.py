"""Collate crops to batches, in a shared-memory buffer between loader processes and trainer that is reused.

New shared memory for every batch would cost a page fault for each of its pages, a tenth of the time of decoding.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from dist_pca.data.transform import Pixels

PREFETCH = 2
"""Number of batches that each loader process prefetches."""


class Batch(NamedTuple):
    """One rank's micro-batch of m crops; in pinned memory if there is CUDA."""

    images: torch.Tensor
    """uint8, m x 3 x height x width, RGB."""
    labels: torch.Tensor | None
    """uint8 train ids, m x height x width; None if the shards have no labels."""
    keys: list[str]
    positions: list[int]
    """Sample indices, counted from the start of the endless stream."""
    skipped: list[str]
    """Error messages of corrupt samples that were replaced."""


class Cut(NamedTuple):
    """One cropped sample."""

    image: Pixels
    """uint8 RGB, 3 x height x width."""
    label: Pixels | None
    """Train ids, height x width."""
    key: str
    position: int
    skipped: list[str]


class Filled(NamedTuple):
    """Slot of a batch in the shared-memory buffer, and its sample keys and indices."""

    worker: int
    place: int
    keys: list[str]
    positions: list[int]
    skipped: list[str]


class Ring:
    """Shared-memory buffer for the batches that a stream's loader processes prefetch.

    A loader process gets a request for a new batch whenever one of its batches has been taken, so at most `PREFETCH`
    batches are ready. The batch before them is copied out before the next request: `PREFETCH` + 1 slots are enough.
    """

    def __init__(self, workers: int, size: int, crop: tuple[int, int], *, labelled: bool) -> None:
        """Allocate slots for batches of `size` crops (height, width) of each of `workers` processes, or of this one."""
        # Without loader processes, each batch is taken before the next one is made.
        places = (workers, PREFETCH + 1, size) if workers else (1, 1, size)
        self.images = _shared(*places, 3, *crop)
        self.labels = _shared(*places, *crop) if labelled else None
        self.size = size

    def fill(self, crops: Iterator[Cut]) -> Iterator[Filled]:
        """Write every `size` crops to the next slot of this loader process, and yield the slot."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        images = self.images[worker].numpy()
        labels = None if self.labels is None else self.labels[worker].numpy()
        for number in count():
            place = number % len(images)
            # webdataset.batched would read the first sample of the next batch before it yields this one.
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
        """Copy a batch out of its slot, which is reused once the next batch is requested."""
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
