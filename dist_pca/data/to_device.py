"""Asynchronous transfer of batches to the GPU."""

from collections.abc import Generator
from contextlib import closing

import torch

from dist_pca.data.collate import Batch


def to_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Copy batches to a device; on a GPU one step ahead, from pinned memory on a separate stream.

    Closing the generator closes `batches`.
    """
    with closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def copy(batch: Batch) -> Batch:
            with torch.cuda.stream(copying):
                labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
                return batch._replace(images=batch.images.to(device, non_blocking=True), labels=labels)

        following = copy(next(batches))
        while True:
            torch.cuda.current_stream(device).wait_stream(copying)
            batch = following
            for part in (batch.images, batch.labels):
                if part is not None:
                    # Otherwise the allocator could reuse its memory for the next copy while this step still reads it.
                    part.record_stream(torch.cuda.current_stream(device))
            following = copy(next(batches))
            yield batch
