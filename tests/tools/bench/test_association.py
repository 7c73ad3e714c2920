import dataclasses
from pathlib import Path

import pytest
import torch

from dist_pca.errors import UserError
from dist_pca.tools.bench import association
from dist_pca.tools.bench.association import Plan, cases, run
from dist_pca.tools.bench.processes import OutOfMemory

PLAN = Plan(
    sizes=(64,),
    channels=16,
    dtypes=("fp32", "bf16"),
    world_size=1,
    communications=(),
    implementations=("dense", "blockwise", "matmul"),
    similarity="cosine",
    data="clustered",
    spread=3.75,
    repeats=1,
    max_seconds=60,
)


def told(plan: Plan) -> list[tuple[str, str, str | None, int]]:
    return [(case.implementation, case.dtype, case.communication, case.n) for case in cases(plan)]


def ignore(_done: int, _what: str) -> None:
    pass


def test_every_size_is_measured_once_and_dense_in_fp32_alone() -> None:
    assert told(dataclasses.replace(PLAN, sizes=(64, 32, 64), implementations=("dense", "blockwise"))) == [
        ("dense", "fp32", None, 32),
        ("blockwise", "fp32", None, 32),
        ("blockwise", "bf16", None, 32),
        ("dense", "fp32", None, 64),
        ("blockwise", "fp32", None, 64),
        ("blockwise", "bf16", None, 64),
    ]


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="on GPUs a plan for two ranks is refused where there is one GPU",
)
def test_between_ranks_both_ways_to_communicate_are_measured_where_there_is_a_choice() -> None:
    assert told(dataclasses.replace(PLAN, world_size=2, dtypes=("fp32",))) == [
        ("dense", "fp32", "gather", 64),
        ("blockwise", "fp32", "gather", 64),
        ("blockwise", "fp32", "ring", 64),
        ("matmul", "fp32", None, 64),
    ]


def test_communication_without_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="--world 2 or more"):
        cases(dataclasses.replace(PLAN, communications=("ring",)))


def test_fewer_kept_cycles_than_matched_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"--kept 0\.2: below --cover 0\.5"):
        cases(dataclasses.replace(PLAN, data="shares", kept=0.2, cover=0.5))


def test_triton_is_never_measured_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" not in {name for name, *_ in told(dataclasses.replace(PLAN, implementations=()))}
    with pytest.raises(UserError, match="CUDA GPU"):
        cases(dataclasses.replace(PLAN, implementations=("triton",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="only on a CPU is it known beforehand what does not fit")
def test_what_does_not_fit_is_a_record_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(association, "available", lambda: 1000)
    records = run(cases(dataclasses.replace(PLAN, implementations=("dense", "matmul"))), ignore)
    assert [(r["seconds"], r["peak_bytes"], r["note"]) for r in records] == [(None, None, "out of memory")] * 3


def test_memory_that_runs_out_underway_is_a_record_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OutOfMemory("rank 0 was killed")

    monkeypatch.setattr(association, "in_fresh_processes", fail)
    (record,) = run(cases(dataclasses.replace(PLAN, implementations=("blockwise",), dtypes=("fp32",))), ignore)
    assert (record["seconds"], record["loss_error"], record["note"]) == (None, None, "out of memory")


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2,
    reason="two ranks need two GPUs or none",
)
def test_ranks_are_exact_with_both_ways_to_communicate_and_report_what_they_sent() -> None:
    plan = dataclasses.replace(PLAN, world_size=2, dtypes=("fp32",))
    dense, gather, ring, product = run(cases(plan), ignore)
    for record in (dense, gather, ring):
        assert record["note"] is None
        assert record["loss_error"] < 1e-6  # type: ignore[operator]
        assert record["gradient_error"] < 1e-5  # type: ignore[operator]
        assert record["communication_bytes"] > 0  # type: ignore[operator]
    assert gather["kept_ratio"] == ring["kept_ratio"] == dense["kept_ratio"]
    assert product["seconds"] > 0  # type: ignore[operator]
    assert [product[name] for name in ("loss_error", "gradient_error", "kept_ratio", "communication_bytes")] == [
        None
    ] * 4


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peaks are read from /proc, which only Linux has",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the processor's memory")
def test_dense_needs_no_more_than_is_foretold_and_blockwise_less() -> None:
    plan = dataclasses.replace(PLAN, sizes=(2500,), implementations=("dense", "blockwise"), dtypes=("fp32",))
    dense, blockwise = run(cases(plan), ignore)
    matrix = 4 * 2500**2
    assert 3 * matrix < int(dense["peak_bytes"] or 0) < association.DENSE_MATRICES * matrix
    assert int(blockwise["peak_bytes"] or 0) < int(dense["peak_bytes"] or 0) / 2
