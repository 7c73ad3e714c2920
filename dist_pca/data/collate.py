"""Collate crops to batches, in shared memory between loader processes and trainer that is reused.

New shared memory for every batch would cost a page fault for each of its pages, a tenth of the time of decoding.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import torch

from dist_pca.data.augment import CropSample
from dist_pca.data.source import loader_process
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest

PREFETCH = 2
"""Number of batches that each loader process prefetches."""
SLOTS = PREFETCH + 1
"""Number of batches for which each loader process has room in shared memory."""


class Batch(NamedTuple):
    """One rank's micro-batch of m crops; in pinned memory if there is CUDA."""

    images: torch.Tensor
    """uint8, m x bands x height x width."""
    labels: torch.Tensor | None
    """uint8 train ids, m x height x width; None if the shards have no labels."""
    keys: list[str]
    indices: list[int]
    """Sample indices, counted from the start of the endless stream."""
    skipped: list[str]
    """Error messages of corrupt samples that were replaced."""
    beside: Sequence[tuple[int, int]] = ()
    """For each crop, the columns of its image to the left and to the right of it; empty for whole images."""


class Slot(NamedTuple):
    """A batch in the shared-memory buffer, with its sample keys and indices."""

    worker: int
    """Index of the loader process."""
    slot: int
    """Index among the slots of that process."""
    keys: list[str]
    indices: list[int]
    skipped: list[str]
    beside: list[tuple[int, int]]


class SharedMemoryBuffer:
    """Shared memory for the batches that a stream's loader processes prefetch.

    A loader process gets a request for a new batch whenever one of its batches has been taken, so at most `PREFETCH`
    batches are ready. The batch before them is copied out before the next request: `PREFETCH` + 1 slots are enough.
    """

    def __init__(self, workers: int, size: int, crop: tuple[int, int], *, labelled: bool, bands: int = 3) -> None:
        """Allocate slots for batches of `size` crops (height, width) of each of `workers` processes, or of this one."""
        # Without loader processes, each batch is copied out before the next one is made.
        slots = (workers, SLOTS, size) if workers else (1, 1, size)
        self.images = torch.empty((*slots, bands, *crop), dtype=torch.uint8)
        self.labels = torch.empty((*slots, *crop), dtype=torch.uint8) if labelled else None
        # One process needs no shared memory, of which a container may have little.
        for memory in (self.images, self.labels) if workers else ():
            if memory is not None:
                memory.share_memory_()  # type: ignore[no-untyped-call]
        self.size = size

    def collate(self, crops: Iterator[CropSample]) -> Iterator[Slot]:
        """Write every `size` crops to the next slot of this loader process, and yield the slot."""
        worker, _ = loader_process()
        images = self.images[worker].numpy()
        labels = None if self.labels is None else self.labels[worker].numpy()
        for number in count():
            slot = number % len(images)
            # webdataset.batched would read the first sample of the next batch before it yields this one.
            members = list(islice(crops, self.size))
            for row, crop in enumerate(members):
                images[slot, row] = crop.image
                if labels is not None:
                    labels[slot, row] = crop.label
            yield Slot(
                worker,
                slot,
                keys=[crop.key for crop in members],
                indices=[crop.sample_index for crop in members],
                skipped=[message for crop in members for message in crop.skipped],
                beside=[crop.beside for crop in members],
            )

    def copy_out(self, slot: Slot) -> Batch:
        """Copy a batch out of its slot, which is reused once the next batch is requested."""
        copy = torch.Tensor.pin_memory if torch.cuda.is_available() else torch.clone
        entry = slot.worker, slot.slot
        return Batch(
            copy(self.images[entry]),
            None if self.labels is None else copy(self.labels[entry]),
            keys=slot.keys,
            indices=slot.indices,
            skipped=slot.skipped,
            # The loader turns tuples into lists.
            beside=[(left, right) for left, right in slot.beside],
        )


def common_bands(manifests: Sequence[Manifest]) -> int:
    """Bands of the images of all shard folders.

    Raises:
        UserError: folders differ.
    """
    first, *others = manifests
    for other in others:
        if other.bands != first.bands:
            raise UserError(
                f"shards {other.folder}: images of {other.bands} bands, and those of {first.folder} have "
                f"{first.bands}; build both with the same `bands` in their recipes"
            )
    return first.bands
