"""A rank that is killed, stopped or stuck ends the others in time, and one line names it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_pca.owner_file import this_process
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.resilience.watchdog import Heartbeat, Watchdog
from tests.support.runs import build_streets, overrides

TIMEOUT = 4.0
RANK = """
import sys, time
from datetime import timedelta
from pathlib import Path
from torch.distributed import TCPStore
from dist_pca.errors import UserError
from dist_pca.resilience.watchdog import Watchdog
rank, size, port, timeout, folder, fault = sys.argv[1:]
if rank == "1" and fault == "late":
    time.sleep(600)
store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=30))
with Watchdog(store, int(rank), int(size), timeout=float(timeout), folder=Path(folder)) as watchdog:
    watchdog.enter("data", 7)
    if rank == "1" and fault == "stuck":
        time.sleep(600)
    if rank == "1" and fault == "error":
        raise UserError("shard-3.tar is damaged")
    watchdog.enter("backward")
    print("ready", flush=True)
    if rank == "1" and fault in ("uneven", "halted"):
        # A rank with more images to validate on, which may be stuck after some of them.
        for _ in range(4 * int(float(timeout))):
            watchdog.enter("validation")
            time.sleep(0.5)
    if fault == "uneven":
        time.sleep((1 - int(rank)) * 2 * float(timeout))
        sys.exit()
    if fault != "none":
        time.sleep(600)
    time.sleep(timedelta(seconds=int(rank)).total_seconds())
"""


def start(folder: Path, size: int, fault: str, *, wait_for: int) -> tuple[object, list["subprocess.Popen[str]"]]:
    """Ranks that have begun a backward pass, and the store they need."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, (rank, size, store.port, TIMEOUT, folder, fault))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for rank, process in enumerate(ranks):
        assert process.stdout is not None
        if rank < wait_for or fault == "none":
            assert process.stdout.readline() == "ready\n"
    # The last rank's pulse must have been heard.
    time.sleep(TIMEOUT / 10)
    return store, ranks


def lines_after(ranks: list["subprocess.Popen[str]"], folder: Path, *, lost: int) -> list[str]:
    """What the ranks said that were left, once they have ended in time."""
    began = time.monotonic()
    said = []
    for rank, process in enumerate(ranks):
        if rank != lost:
            said += process.communicate(timeout=60)[1].splitlines()
            assert process.returncode == ExitCode.LOST_RANK
    # A machine that pauses all processes for a while pauses the clock of the watchdog, but not this one.
    assert time.monotonic() - began < 2 * TIMEOUT
    ranks[lost].wait(timeout=5)
    outcome = read_exit_status(folder)
    assert outcome is not None
    assert outcome.code == ExitCode.LOST_RANK
    assert said == [f"error: {outcome.message}"]
    return said


def wait_for_two_steps(process: "subprocess.Popen[Any]", run: Path) -> None:
    """Wait until a run has logged two steps."""
    metrics = run / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.parametrize(("name", "lost"), [("SIGKILL", 1), ("SIGSTOP", 0)])
def test_a_killed_or_stopped_rank_ends_the_other(tmp_path: Path, name: str, lost: int) -> None:
    _store, ranks = start(tmp_path, 2, "signal", wait_for=2)
    os.kill(ranks[lost].pid, getattr(signal, name))
    (line,) = lines_after(ranks, tmp_path, lost=lost)
    assert f"rank {lost} " in line
    assert "in step 7, backward" in line


def test_a_rank_is_heard_of_as_soon_as_it_watches() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    # Its threads do nothing within the first second.
    with Watchdog(store, 0, 2, timeout=600, folder=None):
        assert store.num_keys() == 1


def test_a_rank_that_is_stopped_before_its_first_heartbeat_ends_the_other(tmp_path: Path) -> None:
    _store, ranks = start(tmp_path, 2, "late", wait_for=1)
    printed = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == ExitCode.LOST_RANK
    assert "rank 1 has not started within" in printed
    ranks[1].kill()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lost"), [("SIGKILL", 0), ("SIGSTOP", 2)])
def test_of_four_ranks_three_end_and_one_of_them_says_so(tmp_path: Path, name: str, lost: int) -> None:
    _store, ranks = start(tmp_path, 4, "signal", wait_for=4)
    os.kill(ranks[lost].pid, getattr(signal, name))
    (line,) = lines_after(ranks, tmp_path, lost=lost)
    assert f"rank {lost} " in line


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_is_named_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    _store, ranks = start(tmp_path, 3, "stuck", wait_for=1)
    said = [line for process in ranks for line in process.communicate(timeout=60)[1].splitlines()]
    assert len(said) == 1
    assert "rank 1 " in said[0]
    assert "has not progressed" in said[0]
    assert "in step 7, data" in said[0]


@pytest.mark.slow
def test_a_rank_may_wait_for_another_for_longer_than_the_time_limit_while_that_one_progresses(tmp_path: Path) -> None:
    _store, ranks = start(tmp_path, 2, "uneven", wait_for=2)
    assert [process.communicate(timeout=60)[1] for process in ranks] == ["", ""]
    assert [process.returncode for process in ranks] == [0, 0]


@pytest.mark.slow
def test_a_rank_that_no_longer_progresses_is_found_in_time_by_one_that_has_waited_long(tmp_path: Path) -> None:
    _store, ranks = start(tmp_path, 2, "halted", wait_for=2)
    # Until rank 1 halts.
    time.sleep(2 * TIMEOUT)
    assert [process.poll() for process in ranks] == [None, None]
    began = time.monotonic()
    said = [line for process in ranks for line in process.communicate(timeout=60)[1].splitlines()]
    assert time.monotonic() - began < 1.5 * TIMEOUT
    assert len(said) == 1
    assert "has not progressed" in said[0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"processes": "pid:[of another container]"}, "has not responded for"),
        ({"host": "of-another-machine"}, "has not responded for"),
        ({}, "died"),
        # Another process has got its number since.
        ({"pid": os.getpid(), "started": 1.0}, "died"),
    ],
    ids=["container", "machine", "here", "reused"],
)
def test_only_processes_that_can_be_looked_up_are(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = this_process()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    heartbeat = Heartbeat(1, 1, 7, "backward", own.host, own.processes, ended.pid, own.started)._replace(**change)
    store.set("heartbeat1", json.dumps(heartbeat))
    command = [sys.executable, "-c", RANK, *map(str, (0, 2, store.port, TIMEOUT, tmp_path, "signal"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.LOST_RANK
    assert f"process {heartbeat.pid}) {what}" in done.stderr


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others_without_a_word(tmp_path: Path) -> None:
    _store, ranks = start(tmp_path, 2, "error", wait_for=1)
    assert ranks[0].communicate(timeout=60)[1] == ""
    assert ranks[0].returncode == ExitCode.LOST_RANK
    assert "shard-3.tar is damaged" in ranks[1].communicate(timeout=60)[1]


@pytest.mark.slow
def test_ranks_that_end_one_after_the_other_accuse_nobody(tmp_path: Path) -> None:
    _store, ranks = start(tmp_path, 2, "none", wait_for=2)
    assert [process.communicate(timeout=60)[1] for process in ranks] == ["", ""]
    assert [process.returncode for process in ranks] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGSTOP", pytest.param("SIGKILL", marks=pytest.mark.exhaustive)])
def test_a_run_that_loses_a_rank_exits_with_the_code_for_it(tmp_path: Path, name: str) -> None:
    build_streets(tmp_path)
    run = tmp_path / "runs" / "lost"
    settings = overrides(tmp_path, "lost", "training.steps=100000", "training.stall_timeout=10")
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *settings, "training.checkpoint_every=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_two_steps(process, run)
        (launcher,) = psutil.Process(process.pid).children()
        (rank,) = [child for child in launcher.children() if child.environ().get("RANK") == "1"]
        rank.send_signal(getattr(signal, name))
        said = process.communicate(timeout=120)[1].splitlines()
    outcome = read_exit_status(run)
    assert outcome is not None
    assert process.returncode == outcome.code == ExitCode.LOST_RANK
    assert [line for line in said if line.startswith("error:")] == [f"error: {outcome.message}"]
    assert outcome.message.startswith("rank 1 ")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_starts_ends_the_run(tmp_path: Path) -> None:
    build_streets(tmp_path)
    settings = overrides(tmp_path, "early", "training.stall_timeout=5")
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (ranks := [child for child in descendants(process.pid) if is_rank(child, 1)]):
            time.sleep(0.05)
        ranks[0].suspend()
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == ExitCode.LOST_RANK
    assert "rank 0: not all 2 ranks have joined within 10 s" in printed
    assert not ranks[0].is_running()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_rank(process: psutil.Process, rank: int) -> bool:
    try:
        return process.environ().get("RANK") == str(rank)
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run_with_one_line_and_a_code(tmp_path: Path) -> None:
    build_streets(tmp_path)
    run = tmp_path / "runs" / "loader"
    settings = overrides(tmp_path, "loader", "training.steps=100000", "training.checkpoint_every=100000")
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_two_steps(process, run)
        (launcher,) = psutil.Process(process.pid).children()
        (rank,) = [child for child in launcher.children() if child.environ().get("RANK") == "1"]
        rank.children()[-1].kill()
        printed = process.communicate(timeout=120)[1]
    outcome = read_exit_status(run)
    assert outcome is not None
    assert process.returncode == outcome.code == ExitCode.LOST_RANK
    assert outcome.message.startswith("rank 1: a loader process was killed")
    assert "Traceback" not in printed


@pytest.mark.slow
def test_ranks_save_and_leave_if_the_command_that_started_them_is_killed(tmp_path: Path) -> None:
    build_streets(tmp_path)
    run = tmp_path / "runs" / "orphaned"
    settings = overrides(tmp_path, "orphaned", "training.steps=100000", "training.checkpoint_every=100000")
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *settings]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for_two_steps(process, run)
        left = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _gone, left = psutil.wait_procs(left, timeout=60)
    assert not left
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(tmp_path: Path) -> None:
    build_streets(tmp_path)
    run = tmp_path / "runs" / "orphaned"
    settings = overrides(tmp_path, "orphaned", "training.steps=100000", "training.checkpoint_every=100000")
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *settings]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for_two_steps(process, run)
        (launcher,) = psutil.Process(process.pid).children()
        ranks = [child for child in launcher.children() if "RANK" in child.environ()]
        launcher.kill()
    _gone, left = psutil.wait_procs(ranks, timeout=60)
    assert not left
    outcome = read_exit_status(run)
    assert outcome is not None
    assert outcome.code == ExitCode.SAVED
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
