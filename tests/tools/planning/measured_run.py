"""`dist_pca.train` that also writes `measured-RANK.json`: bytes alive and bytes sent, by step and phase.

Memory is the storages of all tensors that are alive, from before the network exists. Bytes are those of the tensors of
every collective that PyTorch dispatches, whoever calls it, as a ring of ranks sends them.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer

from dist_pca import train
from dist_pca.resilience.watchdog import Phase, Watchdog
from dist_pca.tools.planning.live import LiveBytes

PHASES = ("data", "teacher", "forward", "backward", "optimizer", "log", "checkpoint")


class Measured(LiveBytes):
    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.step = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.name().removeprefix("c10d::").rstrip("_")
            self.sent[self.phase][name] += ring_bytes(name, args)
        return super().__torch_dispatch__(function, types, args, kwargs)


def ring_bytes(name: str, args: Any) -> float:
    ranks = dist.get_world_size()
    others = ranks - 1
    if name == "allreduce":
        return 2 * others / ranks * size(args[0])
    if name in ("allgather", "_allgather_base"):
        return others * size(args[1])
    if name in ("reduce_scatter", "_reduce_scatter_base", "alltoall_base"):
        return others / ranks * size(args[1])
    if name == "send":
        return size(args[0])
    if name == "broadcast":
        return others / ranks * size(args[0])
    assert name in ("barrier", "recv"), name
    return 0.0


def size(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(size(value) for value in values) if isinstance(values, list | tuple) else 0


def main(config: str, overrides: list[str] = typer.Argument(None)) -> None:  # noqa: B008
    measured = Measured()
    sound_enter = Watchdog.enter

    def enter(self: Watchdog, phase: Phase, step: int | None = None) -> None:
        if phase in PHASES:
            measured.step = measured.step if step is None else step
            measured.begin(f"{measured.step} {phase}")
        sound_enter(self, phase, step)

    Watchdog.enter = enter  # type: ignore[method-assign]
    # The process would end here, before what was measured is written.
    vars(train)["exit_process"] = lambda folder, code: sys.exit(code)
    with measured:
        try:
            train.main(config, overrides)
        except SystemExit as leaving:
            if leaving.code:
                raise
    file = Path(train.resolve_config(config, overrides).output) / f"measured-{os.environ.get('RANK', '0')}.json"
    file.write_text(json.dumps({"peaks": measured.peaks, "sent": measured.sent}, indent=1))


if __name__ == "__main__":
    typer.run(main)
