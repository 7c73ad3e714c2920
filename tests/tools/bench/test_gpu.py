"""Stages of small commands stand for tests and benches, as no test has a GPU's time."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_pca.cli import main
from dist_pca.tools.bench import gpu
from dist_pca.tools.bench.gpu import Stage, measure_gpu, stages
from dist_pca.tools.bench.gpu_record import load_records
from dist_pca.tools.bench.outcomes import read_outcomes
from tests.support.command_lines import in_checkout

TESTS = """
import pytest
def test_holds(): pass
def test_breaks(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no such device")
def test_is_skipped(): pass
"""


def python(name: str, code: str, share: float = 1) -> Stage:
    return Stage(name, (sys.executable, "-c", code), share, gpu._printed)


def some_tests(folder: Path, code: str, share: float = 1) -> Stage:
    file = folder / "test_some.py"
    file.write_text(code)
    command = (sys.executable, "-m", "pytest", str(file), "-q", "-p", "dist_pca.tools.bench.outcomes")
    return Stage("tests", command, share, lambda left: {"tests": read_outcomes(left / "outcomes.jsonl")})


def of_stage(record: Any, name: str) -> Any:
    return record["stages"][name]


def test_stages_continue_after_one_that_fails_and_the_record_has_all(tmp_path: Path) -> None:
    figures = 'print(\'noise\'); print(\'{"records": [{"name": "rate", "value": 3}]}\')'
    to_run = [
        some_tests(tmp_path, TESTS),
        python("broken", "raise SystemExit('no driver')"),
        python("bench", figures),
    ]
    out = tmp_path / "results" / "record.json"
    record = measure_gpu(out, 1, to_run, lambda line: None)
    (read,) = load_records(out.parent)
    assert read == record
    tests = record["tests"]
    assert [[name.partition("::")[2] for name in tests[kind]] for kind in ("passed", "failed", "skipped")] == [
        ["test_holds"],
        ["test_breaks"],
        ["test_is_skipped"],
    ]
    assert "one is not two" in next(iter(tests["failed"].values()))
    assert list(tests["skipped"].values()) == ["no such device"]
    assert [stage["outcome"] for stage in record["stages"].values()] == ["failed", "failed", "done"]
    assert "no driver" in of_stage(record, "broken")["output"]
    assert of_stage(record, "bench")["records"] == [{"name": "rate", "value": 3}]
    assert {"python", "torch", "dist_pca", "cuda"} <= record["versions"].keys()
    assert record["device"]


def test_a_stage_that_takes_longer_is_cut_off_with_its_children_and_leaves_time_for_the_next(tmp_path: Path) -> None:
    waiting = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(76.5)'])"
    begun = time.monotonic()
    record = measure_gpu(
        tmp_path / "record.json", 6 / 60, [python("long", waiting, 2), python("short", "pass", 1)], lambda line: None
    )
    assert time.monotonic() - begun < 6
    assert [stage["outcome"] for stage in record["stages"].values()] == ["cut off", "done"]
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any("time.sleep(76.5)" in " ".join(line) for line in lines)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tests_that_are_cut_off_leave_the_outcomes_so_far_and_the_one_that_ran(tmp_path: Path) -> None:
    endless = TESTS + "\ndef test_waits():\n    import time; time.sleep(60)\n"
    record = measure_gpu(tmp_path / "record.json", 12 / 60, [some_tests(tmp_path, endless)], lambda line: None)
    assert of_stage(record, "tests")["outcome"] == "cut off"
    assert [len(tests) for tests in record["tests"].values()] == [1, 1, 1, 1]
    assert next(iter(record["tests"]["unfinished"])).endswith("test_waits")


def test_the_record_is_written_before_a_stage_that_no_time_is_left_for(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    seen: list[list[str]] = []

    def tell(line: str) -> None:
        seen.append([stage["outcome"] for stage in json.loads(out.read_text())["stages"].values()])

    # The first stage gets next to no time, and the second all of it.
    endless = "import time; time.sleep(60)"
    to_run = [python("first", "pass", 1), python("second", endless, 1e9), python("third", "pass", 1)]
    measure_gpu(out, 4 / 60, to_run, tell)
    not_yet = ["not started"] * 3
    assert seen == [not_yet, ["cut off", *not_yet[1:]], ["cut off", *not_yet[1:]], ["cut off", "cut off", not_yet[2]]]
    assert json.loads(out.read_text())["stages"]["third"]["outcome"] == "not started"


def test_without_a_gpu_one_line_says_so_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["dist-pca", "bench", "gpu", "--out", str(out)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "bench gpu: there is no CUDA GPU" in line
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.exhaustive
@in_checkout
def test_the_stages_of_tests_run_every_file_that_has_tests_for_a_gpu(tmp_path: Path) -> None:
    marked = set()
    for stage in stages(tmp_path / "association.csv"):
        if stage.command[2] == "pytest":
            run = subprocess.run([*stage.command, "--collect-only"], cwd=gpu.CHECKOUT, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
            marked |= {line.partition(":")[0] for line in run.stdout.splitlines() if line.startswith("tests/")}
    everything = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    run = subprocess.run(everything, cwd=gpu.CHECKOUT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert marked == {line.partition(":")[0] for line in run.stdout.splitlines() if line.startswith("tests/")}


def test_every_stage_is_a_command_that_can_be_read(tmp_path: Path) -> None:
    import typer

    from dist_pca.cli import app

    for stage in stages(tmp_path / "association.csv"):
        words = list(stage.command)
        if words[2] != "dist_pca.cli":
            continue
        command: Any = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
        command.commands[words[4]].make_context("bench", words[5:])
