"""Which samples each step was made of, where a run is asked to write that down."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_pca.data.batch import Batch
from dist_pca.training.lines import append_line, drop_lines_after


class SampleLog:
    """Writes `samples.jsonl`: every step's sample keys of both domains, of all ranks, in their global order."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Go on after `start_step` steps in a run folder."""
        self._file = folder / "samples.jsonl"
        self._own: list[tuple[int, int, str]] = []
        if dist.get_rank() == 0:
            drop_lines_after(self._file, start_step)

    def collect(self, batches: Iterable[Batch | None]) -> None:
        """Add a micro-batch of source and target."""
        for domain, batch in enumerate(batches):
            if batch is not None:
                self._own += [(domain, *sample) for sample in zip(batch.positions, batch.keys, strict=True)]

    def step(self, step: int) -> None:
        """Write what was collected as that of step number `step` (from 1). Collective.

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
