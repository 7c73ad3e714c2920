"""Asynchronous transfer of batches to the GPU."""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TypeVar

import torch

from dist_pca.data.collate import Batch

T = TypeVar("T")


def to_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Copy batches to a device; on a GPU one step ahead, from pinned memory on a separate stream.

    Closing the generator closes `batches`.
    """
    with closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
            with torch.cuda.stream(copying):
                labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
                on_device = batch._replace(images=batch.images.to(device, non_blocking=True), labels=labels)
                return on_device, copying.record_event()

        for batch, copied in one_ahead(map(copy, batches)):
            # Waiting for the whole stream would wait for the next batch too.
            torch.cuda.current_stream(device).wait_event(copied)
            for part in (batch.images, batch.labels):
                if part is not None:
                    # Otherwise the allocator could reuse its memory for the next copy while this step still reads it.
                    part.record_stream(torch.cuda.current_stream(device))
            yield batch
            # Frees its memory before another one is copied.
            del batch


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items, each after the next one was fetched; an error in fetching an item is raised in that item's place."""
    fetched: list[T] = []
    ended: Exception | None = None
    while ended is None:
        try:
            fetched.append(next(items))
        except Exception as error:  # No step may need this item: the run may end before it.
            ended = error
        if fetched and (ended is not None or len(fetched) > 1):
            yield fetched.pop(0)
    if not isinstance(ended, StopIteration):
        raise ended
