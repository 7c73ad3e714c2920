"""Association measured: each implementation on the same pixels in fresh processes, beside one bare product."""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_pca.association.options import Similarity
from dist_pca.errors import UserError
from dist_pca.tools.bench.cases import Case, Communication, Data, Measured, Precision
from dist_pca.tools.bench.measure import Reading, ReferenceValues, compute_reference, measure, measure_peak
from dist_pca.tools.bench.memory import available
from dist_pca.tools.bench.processes import OutOfMemory, in_fresh_processes
from dist_pca.tools.bench.report import Record

CONFIGURATION = (
    *("implementation", "communication", "world_size", "dtype", "n_source", "n_target", "channels"),
    *("similarity", "data", "spread", "kept", "cover"),
)
"""Fields of a record that say what was measured."""

MOST_REFERENCE_PIXELS = 12_000
"""Above this the fp64 reference would take longer than all that is compared with it."""

OUT_OF_MEMORY = "out of memory"

DENSE_MATRICES = 6.0
"""Matrices of n x n that dense autograd holds at its peak; measured, rounded up."""


@dataclass(frozen=True)
class Plan:
    """What one run of the bench measures."""

    sizes: Sequence[int]
    """Pixels of each domain on each rank, one after the other."""
    channels: int
    dtypes: Sequence[Precision]
    world_size: int
    communications: Sequence[Communication]
    """Empty stands for all in a world of several ranks."""
    implementations: Sequence[Measured]
    """Empty stands for all that can run here."""
    similarity: Similarity
    data: Data
    spread: float
    repeats: int
    max_seconds: float
    kept: float | None = None
    cover: float | None = None
    classes: int = 19
    seed: int = 0


def cases(plan: Plan) -> list[Case]:
    """What a plan comes down to, from the smallest size to the largest.

    Raises:
        UserError: the plan asks for what cannot be measured here.
    """
    if plan.communications and plan.world_size == 1:
        raise UserError("--communication is between ranks: give --world 2 or more, or leave --communication out")
    if torch.cuda.is_available() and plan.world_size > torch.cuda.device_count():
        raise UserError(
            f"--world {plan.world_size} needs as many GPUs and this machine has {torch.cuda.device_count()}; "
            "give less, or hide them with CUDA_VISIBLE_DEVICES= to measure on the processor"
        )
    if plan.data == "shares" and (plan.kept or 0.0) < (plan.cover or 0.0):
        raise UserError(
            f"--kept {plan.kept}: below --cover {plan.cover}, but each matched target has a cycle that is kept; "
            "give --kept at least as much"
        )
    threads = max(1, torch.get_num_threads() // plan.world_size)
    return [
        Case(
            implementation=implementation,
            dtype=dtype,
            n=n,
            channels=plan.channels,
            world_size=plan.world_size,
            communication=communication,
            similarity=plan.similarity,
            data=plan.data,
            spread=plan.spread,
            classes=plan.classes,
            seed=plan.seed,
            repeats=plan.repeats,
            max_seconds=plan.max_seconds,
            threads=threads,
            kept=plan.kept,
            cover=plan.cover,
        )
        for n in sorted(set(plan.sizes))
        for implementation in _implementations(plan)
        for dtype in _dtypes(plan, implementation)
        for communication in _communications(plan, implementation)
    ]


def run(plan_cases: Sequence[Case], progress: Callable[[int, str], None]) -> list[Record]:
    """Measure cases one after the other.

    Args:
        plan_cases: What to measure.
        progress: Called before each case with the number of finished cases and a description of the next one.
    """
    records = []
    with tempfile.TemporaryDirectory() as folder:
        references: dict[int, tuple[ReferenceValues, Path] | None] = {}
        for done, case in enumerate(plan_cases):
            if case.n not in references:
                progress(done, f"fp64 reference, n = {case.n}")
                references[case.n] = _reference(case, Path(folder) / f"reference_{case.n}.pt")
            progress(done, _shown(case))
            records.append(_record(case, references[case.n], Path(folder) / f"store_{done}"))
    return records


def _implementations(plan: Plan) -> Iterator[Measured]:
    for implementation in dict.fromkeys(plan.implementations or ("dense", "blockwise", "triton", "matmul")):
        if implementation == "triton" and not _triton_runs():
            if implementation in plan.implementations:
                raise UserError(
                    "--implementation triton needs a CUDA GPU that Triton compiles for, and there is none here; "
                    "leave it out, or run this command on a machine with one"
                )
            continue
        yield implementation


def _triton_runs() -> bool:
    """Whether Triton's kernels run compiled: its interpreter says nothing about speed."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    from dist_pca.association.triton_launch import can_run

    return can_run(torch.device("cuda"))


def _dtypes(plan: Plan, implementation: Measured) -> Sequence[Precision]:
    # The definition knows fp32 alone, whatever the others are compared in.
    return ("fp32",) if implementation == "dense" else tuple(dict.fromkeys(plan.dtypes))


def _communications(plan: Plan, implementation: Measured) -> Sequence[Communication | None]:
    if plan.world_size == 1 or implementation == "matmul":
        return (None,)
    # Dense rows are whole, so it gathers.
    return ("gather",) if implementation == "dense" else tuple(dict.fromkeys(plan.communications or ("gather", "ring")))


def _reference(case: Case, file: Path) -> tuple[ReferenceValues, Path] | None:
    if case.pixels > MOST_REFERENCE_PIXELS or not _fits(2 * _dense_bytes(case)):
        return None
    try:
        return in_fresh_processes(compute_reference, 1, case, file)[0], file
    except OutOfMemory:
        return None


def _record(case: Case, reference: tuple[ReferenceValues, Path] | None, store: Path) -> Record:
    record: Record = {
        "implementation": case.implementation,
        "communication": case.communication,
        "world_size": case.world_size,
        "dtype": case.dtype,
        "n_source": case.n,
        "n_target": case.n,
        "channels": case.channels,
        "seconds": None,
        "peak_bytes": None,
        "loss_error": None,
        "gradient_error": None,
        "similarity": case.similarity,
        "data": case.data,
        "spread": case.spread if case.data == "clustered" else None,
        "kept": case.kept,
        "cover": case.cover,
        "seconds_value": None,
        "repeats": None,
        "kept_ratio": None,
        "cover_ratio": None,
        "communication_bytes": None,
        "unavoidable_products": None,
        "note": None,
    }
    if not torch.cuda.is_available() and not _fits(_needed_bytes(case)):
        return record | {"note": OUT_OF_MEMORY}
    values, file = reference or (None, None)
    try:
        # Apart, because what makes a peak exact makes allocation slow.
        peaks = in_fresh_processes(measure_peak, case.world_size, case, store.with_suffix(".peak"))
        readings = in_fresh_processes(measure, case.world_size, case, store.with_suffix(".time"), file)
    except OutOfMemory:
        return record | {"note": OUT_OF_MEMORY}
    known = [peak for peak in peaks if peak is not None]
    return record | {"peak_bytes": max(known, default=None)} | _measured(readings, values)


def _measured(readings: Sequence[Reading], reference: ReferenceValues | None) -> Record:
    """The ranks' readings as one: the slowest's time, the worst error."""
    seconds, seconds_value = (
        [max(times) for times in zip(*ranks, strict=True)]
        for ranks in ([reading.seconds for reading in readings], [reading.seconds_value for reading in readings])
    )
    sent = [reading.communication_bytes for reading in readings if reading.communication_bytes is not None]
    first = readings[0]
    measured: Record = {
        "seconds": statistics.median(seconds),
        "seconds_value": statistics.median(seconds_value) if seconds_value else None,
        "repeats": len(seconds),
        "kept_ratio": first.kept_ratio,
        "cover_ratio": first.cover_ratio,
        "communication_bytes": max(sent, default=None),
        "unavoidable_products": first.unavoidable_products,
    }
    if reference is not None and first.loss is not None:
        differences = [reading.gradient_difference for reading in readings if reading.gradient_difference is not None]
        # Relative, which zero has no error in: of one pixel loss and gradients are 0.
        if reference.loss and reference.largest_gradient:
            measured["loss_error"] = abs(first.loss - reference.loss) / abs(reference.loss)
            measured["gradient_error"] = max(differences) / reference.largest_gradient
    return measured


def _needed_bytes(case: Case) -> float:
    """What the ranks of one machine need together, where that grows with the square of n; else 0."""
    if case.implementation == "dense":
        return _dense_bytes(case)
    if case.implementation == "matmul":
        return case.pixels**2 * (2 if case.dtype == "bf16" else 4)
    return 0


def _dense_bytes(case: Case) -> float:
    return DENSE_MATRICES * 4 * case.pixels**2


def _fits(needed: float) -> bool:
    there = available()
    return there is None or needed < there


def _shown(case: Case) -> str:
    world = "" if case.world_size == 1 else f", {case.world_size} ranks"
    return " ".join(filter(None, (case.implementation, case.dtype, case.communication))) + f", n = {case.n}{world}"
