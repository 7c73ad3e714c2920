"""Records that `dist-pca bench gpu` wrote, and what they allow to be said about GPUs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dist_pca.files import read_record
from dist_pca.tools.bench.outcomes import Outcomes

RECORDS = Path(__file__).with_name("results")
"""Records worth keeping, part of the package: NAME.json for each GPU, and the bench's NAME.csv beside it."""
NOT_RUN = "not run"
TESTS = {
    "association, blockwise, on 1 to 8 ranks": ("tests/gpu/test_association.py",),
    "association, Triton kernels": ("tests/association/test_triton_kernels.py", "tests/gpu/test_kernels.py"),
    "training under ZeRO 1, 2 and 3, bf16, CPU offload, fp16's loss scaling": ("tests/gpu/test_runs.py",),
    "NVMe offload, `torch.compile` on GPUs, NCCL": ("tests/gpu/test_collectives.py", "tests/gpu/test_special_runs.py"),
    "resuming, signals, lost ranks, full disks": ("tests/gpu/test_killed_run.py",),
}
"""First cells of rows of the README's table of what has been run, and the files whose tests decide the GPU's cell."""


class GpuRecord(TypedDict):
    """What `bench gpu` writes."""

    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    minutes: float
    tests: Outcomes
    stages: dict[str, dict[str, Any]]
    """Outcome of each (`done`, `failed`, `cut off`, `not started`), seconds, and figures or the end of its output."""


_RECORD = TypeAdapter(GpuRecord)


def load_records(folder: Path = RECORDS) -> list[GpuRecord]:
    """Read all records in a folder, by file name; none where there is no folder.

    Raises:
        UserError: a file is not such a record.
    """
    return [
        read_record(path, _RECORD, "make it again with `dist-pca bench gpu`") for path in sorted(folder.glob("*.json"))
    ]


def gpu_column(records: Sequence[GpuRecord]) -> dict[str, str]:
    """Build the GPU's cell of each row of the README's table that records decide."""
    cells = {}
    for row, files in TESTS.items():
        said = [words for record in records if (words := _outcome(record, files))]
        cells[row] = "; ".join(said) or NOT_RUN
    return cells


def _outcome(record: GpuRecord, files: Sequence[str]) -> str | None:
    """Count of tests in these files that passed and did not; None if the GPU ran none of them."""
    counts = {
        outcome: sum(test.startswith(tuple(files)) for test in tests) for outcome, tests in record["tests"].items()
    }
    counts.pop("skipped", None)
    ran = sum(counts.values())
    if not ran:
        return None
    words = [f"{counts.get('passed', 0)} of {ran} tests pass"]
    words += [f"{counts[outcome]} {outcome}" for outcome in ("failed", "unfinished") if counts.get(outcome)]
    return f"{', '.join(words)} on {record['device']} ({record['date'].split()[0]})"
