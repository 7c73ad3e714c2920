"""A training step on ever more ranks of this machine: what each of them computes, keeps and sends, phase by phase.

The network, batch norm over ranks, the objective and the sum of gradients are those of training, over gloo. DeepSpeed,
loader processes and the optimiser's update are left out, so that many ranks fit one machine.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from dist_pca.association.candidates import listen
from dist_pca.config import RunConfig, load_config
from dist_pca.cores import usable_cores
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective import Domain, objective
from dist_pca.resources import resource
from dist_pca.tools.bench.memory import available
from dist_pca.tools.bench.processes import in_fresh_processes
from dist_pca.tools.bench.report import Record
from dist_pca.tools.planning.live import LiveBytes

CLASSES = 19
RANK_BYTES = 400 * 2**20
"""Memory of one rank's process, most of which is PyTorch."""
PHASES = ("forward", "objective", "association", "communication", "backward", "gradients")
_HEADINGS = {"seconds": "CPU", "transport_seconds": "gloo", "peak_bytes": "peak", "bytes_sent": "sent"}
SETTINGS = (
    *("data.crop=[64,96]", "data.shorter_edge=[64,64]", "objective.association.start_step=0"),
    *("model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null", "model.batch_norm=sync"),
    *("model.head_channels=16", "objective.self_training.weight=0", "training.ema_decay=0"),
    *(f"objective.association.teacher_{what}=false" for what in ("check", "weight", "matches")),
)


class ScaleCase(NamedTuple):
    """What is measured on each number of ranks."""

    scope: str
    """Scope of association."""
    bins: int | None
    """Bins of Lovasz-Softmax over all ranks; None sorts."""
    steps: int
    """Timed steps, of which the mean counts."""


class _Reading(NamedTuple):
    """One phase of a step on one rank."""

    seconds: float
    """CPU seconds of the thread that runs the step."""
    transport_seconds: float
    """CPU seconds of the process's other threads."""
    wall_seconds: float
    peak_bytes: int
    bytes_sent: float


def measure_scale(worlds: Sequence[int], case: ScaleCase, tell: Callable[[str], object]) -> list[Record]:
    """Measure a step on each number of ranks; one record for each phase, and one for the whole step.

    `seconds` are the CPU seconds of the thread that runs a rank's step, and `transport_seconds` those of the threads in
    which gloo sends, receives and adds up, both as means over ranks. Gloo's all-reduce is a ring of 2 (W - 1) messages
    a rank, each of which wakes a thread, where NCCL takes trees; so the transport's seconds say little about GPUs.
    Ranks share this machine's cores, and `wall_seconds` are those in which the cores serve all of them. `peak_bytes`
    are those of the rank with the most, of tensors that are alive; `bytes_sent` those that one rank sends if
    collectives are rings.

    Args:
        worlds: Numbers of ranks.
        case: What is measured.
        tell: Called with a description of each step.

    Raises:
        UserError: the ranks do not fit this machine's memory.
    """
    there = available()
    if there is not None and max(worlds) * RANK_BYTES > there:
        raise UserError(
            f"--worlds: {max(worlds)} ranks need about {max(worlds) * RANK_BYTES / 2**30:.0f} GiB, and "
            f"{there / 2**30:.0f} GiB are free; give at most {there // RANK_BYTES}"
        )
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in worlds:
            tell(f"a step on {ranks} ranks")
            readings = in_fresh_processes(_measure_rank, ranks, ranks, case, Path(folder) / f"store{ranks}")
            records += _records(ranks, case, readings)
    return records


def _records(ranks: int, case: ScaleCase, readings: Sequence[dict[str, _Reading]]) -> list[Record]:
    common: Record = {"world_size": ranks, "cores": usable_cores(), "scope": case.scope, "lovasz_bins": case.bins}
    records: list[Record] = []
    for phase in PHASES:
        parts = [reading[phase] for reading in readings if phase in reading]
        if parts:
            records.append(
                common
                | {
                    "phase": phase,
                    "seconds": sum(part.seconds for part in parts) / len(parts),
                    "transport_seconds": sum(part.transport_seconds for part in parts) / len(parts),
                    "wall_seconds": sum(part.wall_seconds for part in parts) / len(parts),
                    "peak_bytes": max(part.peak_bytes for part in parts),
                    "bytes_sent": max(part.bytes_sent for part in parts),
                }
            )
    whole: Record = {"phase": "step"}
    for field in ("seconds", "transport_seconds", "wall_seconds", "bytes_sent"):
        whole[field] = sum(float(record[field] or 0) for record in records)
    whole["peak_bytes"] = max(int(record["peak_bytes"] or 0) for record in records)
    return [*records, common | whole]


def scale_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row of cells for each phase, with a column of each figure for each number of ranks."""
    worlds = dict.fromkeys(record["world_size"] for record in records)
    rows = []
    for phase in dict.fromkeys(record["phase"] for record in records):
        row = {"phase": str(phase)}
        for field, unit, scale in (
            ("seconds", "ms", 1e3),
            ("transport_seconds", "ms", 1e3),
            ("peak_bytes", "MiB", 2**-20),
            ("bytes_sent", "KiB", 2**-10),
        ):
            for world in worlds:
                found = [r for r in records if r["phase"] == phase and r["world_size"] == world]
                row[f"{_HEADINGS[field]} {unit}, {world} ranks"] = f"{scale * float(found[0][field] or 0):,.3g}"
        rows.append(row)
    return rows


class _Clock:
    """Adds up seconds of this process by phase, and names the phase to what counts bytes."""

    def __init__(self) -> None:
        self.live: LiveBytes | None = None
        self.phase = "start"
        self._since = _clocks()
        self._seconds: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def enter(self, phase: str) -> str:
        now = _clocks()
        for place, (before, after) in enumerate(zip(self._since, now, strict=True)):
            self._seconds[self.phase][place] += after - before
        before_this, self.phase, self._since = self.phase, phase, now
        if self.live is not None:
            self.live.begin(phase)
        return before_this

    def take(self) -> dict[str, list[float]]:
        self.enter(self.phase)
        taken, self._seconds = self._seconds, defaultdict(lambda: [0.0, 0.0, 0.0])
        return taken


def _clocks() -> tuple[float, float, float]:
    """CPU seconds of this thread, of all threads, and wall seconds."""
    return time.thread_time(), time.process_time(), time.perf_counter()


def _measure_rank(rank: int, ranks: int, case: ScaleCase, store: Path) -> dict[str, _Reading]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    config = load_config(resource("configs", "demo"), [*SETTINGS, *_overrides(case)])
    torch.manual_seed(0)
    model = build_segmenter(config.model, CLASSES).train()
    clock = _Clock()
    listen(clock.enter)
    # The first step connects ranks and starts threads.
    _step(config, model, rank, clock)
    clock.take()
    for _ in range(case.steps):
        _step(config, model, rank, clock)
    seconds = clock.take()
    with LiveBytes() as live:
        live.count([*model.parameters(), *model.buffers()])
        clock.live = live
        _step(config, model, rank, clock)
        clock.live = None
    listen(None)
    dist.barrier()
    dist.destroy_process_group()
    return {
        phase: _Reading(
            own / case.steps, (cpu - own) / case.steps, wall / case.steps, live.peaks[phase], live.sent[phase]
        )
        for phase, (own, cpu, wall) in seconds.items()
        if phase in PHASES
    }


def _overrides(case: ScaleCase) -> list[str]:
    bins = "null" if case.bins is None else case.bins
    return [f"objective.association.scope={case.scope}", f"objective.lovasz.bins={bins}", "objective.lovasz.weight=1"]


def _step(config: RunConfig, model: Segmenter, rank: int, clock: _Clock) -> None:
    """Forward and backward pass of one source and one target image, and the sum of gradients over ranks."""
    generator = torch.Generator().manual_seed(rank)
    height, width = config.data.crop
    images = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (1, height // 8, width // 8), generator=generator)
    labels = labels.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    clock.enter("forward")
    logits, features, _ = model(images)
    clock.enter("objective")
    source, target = (Domain(logits[i : i + 1], features[i : i + 1], labels if i == 0 else None, [i]) for i in (0, 1))
    loss, _ = objective(config.objective, source, target, step=0)
    clock.enter("backward")
    loss.backward()  # type: ignore[no-untyped-call]
    clock.enter("gradients")
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    model.zero_grad()
    clock.enter("start")
