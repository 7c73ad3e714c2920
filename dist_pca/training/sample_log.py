"""The sample log: which samples each step was trained on, where `telemetry.sample_keys` asks for it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_pca.data.collate import Batch
from dist_pca.files import append_line, drop_lines_after


class SampleLog:
    """Writes `samples.jsonl`: the sample keys of each step by domain, over all ranks, in their global order."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Open the log of a run folder, without lines after `start_step`."""
        self._file = folder / "samples.jsonl"
        self._own: list[tuple[int, int, str]] = []
        if dist.get_rank() == 0:
            drop_lines_after(self._file, start_step)

    def accumulate(self, batches: Iterable[Batch | None]) -> None:
        """Add a micro-batch's source and target batch."""
        for domain, batch in enumerate(batches):
            if batch is not None:
                self._own += [(domain, *sample) for sample in zip(batch.indices, batch.keys, strict=True)]

    def write(self, step: int) -> None:
        """Write the accumulated keys as those of step `step` (from 1). Collective.

        Raises:
            UserError: on rank 0, it cannot be written.
        """
        samples: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(samples, self._own)
        self._own = []
        if dist.get_rank() == 0:
            ordered = sorted(sample for own in samples for sample in own)
            keys = {
                name: [key for domain, _, key in ordered if domain == number]
                for number, name in enumerate(("source", "target"))
            }
            append_line(self._file, json.dumps({"step": step, **keys}))
