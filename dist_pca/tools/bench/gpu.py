"""Everything that needs a GPU, in one go: tests, benches and a short run, and one record of them.

Stages are processes of their own, the most valuable first. Each has a share of the time that is left, is stopped when
that is over, and may fail; the record is written after each, so that whatever ends the program leaves what was
measured.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import dist_pca
from dist_pca.cores import usable_cores
from dist_pca.errors import UserError
from dist_pca.files import write_record
from dist_pca.tools.bench.gpu_record import RECORDS, GpuRecord
from dist_pca.tools.bench.outcomes import OUTCOMES_FILE, Outcomes, read_outcomes
from dist_pca.tools.bench.report import commit, device_name, versions

CHECKOUT = Path(dist_pca.__file__).parents[1]
_OUTPUT_CHARACTERS = 2000
"""What is kept of the output of a stage that fails."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Stage:
    """One process, and how to read what it left."""

    name: str
    command: Sequence[str]
    share: float
    """Weight in dividing the time that is left."""
    figures: Callable[[Path], dict[str, Any]]
    """Reads figures from the stage's folder, finished or not; it has `stdout` and what the command wrote."""


def stages(csv: Path) -> list[Stage]:
    """Stages for a GPU, the most valuable first.

    Args:
        csv: Where the association bench saves its records.
    """
    bench = (sys.executable, "-m", "dist_pca.cli", "bench")
    association = (*bench, "association", "--repeats", "3", "--max-seconds", "10", "--json", "--save", str(csv))
    large = ("--n", "65536", "--sweep", "131072", "--implementation", "triton", "--implementation", "matmul")
    return [
        _tests("tests of parts", "gpu and not slow", share=3),
        Stage("association", (*association, "--sweep", "16384,32768"), 1.5, _printed),
        _tests("tests of runs", "gpu and slow", share=4),
        Stage("run", (sys.executable, "-m", "dist_pca.tools.bench.gpu_run"), 1.5, _printed),
        Stage("association, many pixels", (*association, *large), 1, _printed),
        Stage("association, wide", (*association, "--n", "16384", "--channels", "2048"), 1, _printed),
        Stage("train", (*bench, "train", "--repeats", "60", "--json"), 1, _printed),
    ]


def measure_gpu(out: Path, minutes: float, to_run: Sequence[Stage], tell: Callable[[str], object]) -> GpuRecord:
    """Run stages within a time, and write the record after each.

    Args:
        out: The record, a JSON file.
        minutes: Time for all stages.
        to_run: The stages, in their order.
        tell: Called with a line about each stage.

    Returns:
        The record.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    record: GpuRecord = {
        "device": device_name(),
        "machine": _machine(),
        "versions": versions() | _libraries(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "minutes": minutes,
        "tests": {outcome: {} for outcome in ("passed", "failed", "skipped", "unfinished")},
        "stages": {stage.name: {"outcome": "not started", "seconds": 0.0} for stage in to_run},
    }
    write_record(out, record)
    for place, stage in enumerate(to_run):
        left = end - time.monotonic()
        if left <= 1:
            break
        limit = left * stage.share / sum(later.share for later in to_run[place:])
        tell(f"{stage.name}: up to {limit:.0f} s")
        with tempfile.TemporaryDirectory() as name:
            found = _run(stage, Path(name), limit)
        tests: Outcomes = found.pop("tests", {})
        for outcome, names in tests.items():
            record["tests"][outcome] |= names
        record["stages"][stage.name] = found
        write_record(out, record)
        tell(f"{stage.name}: {found['outcome']} after {found['seconds']:.0f} s{_counts(tests)}")
    return record


def default_out() -> Path:
    """Where the record of this machine's GPU belongs."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return RECORDS / f"{name}.json"


def require_gpu() -> None:
    """Refuse a machine without a CUDA GPU.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "bench gpu: there is no CUDA GPU that PyTorch can use; run it on a machine with one, "
            "with a PyTorch built for CUDA (`dist-pca doctor` shows what is there)"
        )


def _machine() -> dict[str, Any]:
    """Count, memory and compute capability of GPUs, and their driver; the processor's cores."""
    found: dict[str, Any] = {"cores": usable_cores()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpus"] = torch.cuda.device_count()
        found["memory_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        found["driver"] = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
    return found


def _libraries() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda or "")}
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for name in ("deepspeed", "accelerate", "timm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _tests(name: str, marks: str, share: float) -> Stage:
    """Tests with these marks; a file that cannot be imported here is recorded and does not stop the others."""
    folder = CHECKOUT / "tests"
    # Importing all of the tests takes as long as running some.
    marked = [file for file in folder.rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")]
    files = sorted({str(file) for file in (*marked, *folder.glob("gpu/test_*.py"))})
    command = (
        *(sys.executable, "-m", "pytest", *(files or [str(folder)]), "--rootdir", str(CHECKOUT), "-m", marks),
        *("-p", "dist_pca.tools.bench.outcomes", "-p", "no:cacheprovider"),
        *("--tb=short", "--continue-on-collection-errors"),
    )
    return Stage(name, command, share, lambda left: {"tests": read_outcomes(left / "outcomes.jsonl")})


def _run(stage: Stage, folder: Path, limit: float) -> dict[str, Any]:
    """Run a stage, whose output goes into a folder of its own."""
    environment = os.environ | {
        OUTCOMES_FILE: str(folder / "outcomes.jsonl"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
    }
    begun = time.monotonic()
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(stage.command, stdout=out, stderr=err, cwd=CHECKOUT, env=environment)
        try:
            while process.poll() is None and time.monotonic() < begun + limit:
                time.sleep(_POLL_SECONDS)
            cut_off = process.poll() is None
        finally:
            _kill(process)
    seconds = time.monotonic() - begun
    outcome = "cut off" if cut_off else "failed" if process.returncode else "done"
    found: dict[str, Any] = {"outcome": outcome, "seconds": round(seconds, 1)}
    try:
        found |= stage.figures(folder)
    except (OSError, ValueError, UserError) as error:
        found["unreadable"] = str(error)
    if outcome != "done":
        found["exit_code"] = None if cut_off else process.returncode
        found["output"] = "".join(
            (folder / name).read_text(encoding="utf-8", errors="replace")[-_OUTPUT_CHARACTERS:]
            for name in ("stdout", "stderr")
        )
    return found


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a stage with all that it started, ranks in sessions of their own too."""
    if process.poll() is None:
        with suppress(psutil.Error):
            for member in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    member.kill()
        process.kill()
    process.wait()


def _printed(folder: Path) -> dict[str, Any]:
    """Records that a command printed as JSON."""
    printed = (folder / "stdout").read_text(encoding="utf-8")
    return {"records": json.loads(printed[printed.index("{") :])["records"]} if "{" in printed else {}


def _counts(tests: Outcomes) -> str:
    return ": " * bool(tests) + ", ".join(f"{len(names)} {outcome}" for outcome, names in tests.items())
