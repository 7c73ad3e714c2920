"""A signal to any rank, or the clock, ends all ranks after the same step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_pca.config import load_config
from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.resilience.preemption import SLURM_MARGIN, StopRequest
from dist_pca.resources import resource
from tests.support.ranks import run_on_ranks
from tests.support.runs import build_streets, overrides
from tests.test_distributed import free_port


def leave_together(rank: int, world_size: int, number: int) -> tuple[int, str, int]:
    import torch

    stop = StopRequest()
    stop.joined()
    for step in range(1, 200):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), number)
            stop.wait(5)
        if stop.any_rank(step, torch.device("cpu")):
            return stop.step, stop.reason, int(stop.exit_code)
    raise AssertionError("never agreed")


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", ExitCode.SAVED), ("SIGINT", ExitCode.INTERRUPTED)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path, name: str, code: ExitCode) -> None:
    found = run_on_ranks(leave_together, 2, tmp_path, int(getattr(signal, name)))
    assert found == [(3, name, code)] * 2


@pytest.mark.parametrize(
    ("written", "seconds"),
    # The first two are read as YAML before they are read as a duration.
    [("10:00:00", 36000), ("90", 90), ("00:30:00", 1800), ("1-02:00:00", 93600)],
)
def test_a_time_limit_is_seconds_or_slurms_notation(written: str, seconds: float) -> None:
    config = load_config(resource("configs", "demo"), [f"training.time_limit={written}"])
    assert config.training.time_limit == seconds


@pytest.mark.parametrize("written", ["8h", "soon", "-5", "0", "00:00:00"])
def test_a_time_limit_that_is_none_names_its_key(written: str) -> None:
    with pytest.raises(UserError, match=r"training\.time_limit"):
        load_config(resource("configs", "demo"), [f"training.time_limit={written}"])


def run_out_of_time(rank: int, world_size: int, environment: dict[str, str], seconds: float | None) -> tuple[str, int]:
    import torch

    stop = StopRequest()
    stop.joined()
    # The clocks of two machines differ.
    stop.limit(seconds if rank == 0 else None, environment)
    while not stop.any_rank(1, torch.device("cpu")):
        time.sleep(0.01)
    return stop.reason, int(stop.exit_code)


@pytest.mark.parametrize("slurm", [False, True])
def test_time_is_up_on_all_ranks_together(tmp_path: Path, slurm: bool) -> None:
    environment = {"SLURM_JOB_END_TIME": str(int(time.time() + SLURM_MARGIN + 1))} if slurm else {}
    found = run_on_ranks(run_out_of_time, 2, tmp_path, environment, None if slurm else 0.3)
    assert found == [("out of time", ExitCode.SAVED)] * 2


def test_a_process_that_listens_for_signals_can_end() -> None:
    code = "from dist_pca.resilience.preemption import StopRequest; StopRequest()"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_second_signal_ends_a_process_that_waits_in_native_code() -> None:
    # Sleeps stand for a collective that does not end: Python's own handlers would not run meanwhile. A signal ends one.
    code = (
        "import ctypes; from dist_pca.resilience import preemption; preemption.ECHO_SECONDS = 2.0; "
        "stop = preemption.StopRequest(); stop.joined(); print('ready', flush=True); "
        "[ctypes.CDLL(None).sleep(60) for _ in range(9)]"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # The same request, as a launcher passes it on.
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGTERM", ExitCode.SAVED), ("SIGUSR1", ExitCode.SAVED), ("SIGINT", ExitCode.INTERRUPTED)],
)
def test_until_the_ranks_have_joined_the_first_signal_ends_a_process(name: str, code: ExitCode) -> None:
    # The sleeps stand for waiting for a rank that never joins.
    script = (
        "import ctypes; from dist_pca.resilience.preemption import StopRequest; stop = StopRequest(); "
        "print('ready', flush=True); [ctypes.CDLL(None).sleep(60) for _ in range(9)]"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        try:
            assert process.wait(timeout=5) == code
        finally:
            process.kill()


def test_once_the_run_is_saved_signals_are_ignored() -> None:
    script = (
        "import os, signal, time; from dist_pca.resilience import preemption; preemption.ECHO_SECONDS = 0.1; "
        "stop = preemption.StopRequest(); stop.joined(); os.kill(os.getpid(), signal.SIGTERM); assert stop.wait(5); "
        "time.sleep(0.5); stop.ignore(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5); print('written')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "written\n"), done.stderr


@pytest.mark.slow
def test_a_rank_that_waits_for_another_to_join_ends_at_once_when_asked_to(tmp_path: Path) -> None:
    build_streets(tmp_path)
    port = free_port()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment = os.environ | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "dist_pca.train", "demo", *overrides(tmp_path, "alone")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        # It is there that it waits for rank 1.
        while not any(found.laddr.port == port for found in psutil.Process(process.pid).net_connections()):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=10) == ExitCode.SAVED
        finally:
            process.kill()
    # Under a launcher, another rank's error may be the reason.
    assert read_exit_status(tmp_path / "runs" / "alone") is None


@pytest.mark.slow
def test_a_launcher_that_ends_ranks_once_the_first_has_left_cuts_off_no_report(tmp_path: Path) -> None:
    build_streets(tmp_path)
    script = f"""
import os, signal, time
from dist_pca import train
from dist_pca.resilience import preemption
preemption.ECHO_SECONDS = 0.1
def write_report(run):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    return "; the report is whole"
train.write_report = write_report
train.main("demo", {overrides(tmp_path, "reported", "training.steps=1")}, None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert done.stderr.splitlines()[-1].endswith("the report is whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", ExitCode.SAVED),
        pytest.param("SIGUSR1", ExitCode.SAVED, marks=pytest.mark.exhaustive),
        pytest.param("SIGINT", ExitCode.INTERRUPTED, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signalled_run_answers_at_once_is_saved_says_so_in_one_line_and_goes_on(
    tmp_path: Path, name: str, code: ExitCode
) -> None:
    build_streets(tmp_path)
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo"]
    run = tmp_path / "runs" / "told"
    settings = overrides(tmp_path, "told", "training.steps=1000", "training.checkpoint_every=1000")
    with subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children(recursive=True)
        # As a terminal and SLURM do: to all of the process group at once.
        os.killpg(process.pid, getattr(signal, name))
        said = process.communicate(timeout=120)[1].splitlines()
        assert process.returncode == code
    outcome = read_exit_status(run)
    assert outcome is not None
    assert outcome.code == code
    answer = f"{name}: saving after this step; a second signal ends the run at once"
    assert [line for line in said[1:] if not line.startswith(("step", "association"))] == [answer, outcome.message]
    assert not any(rank.is_running() for rank in ranks)
    (saved,) = (run / "checkpoints").glob("step-*")
    made = int(saved.name.removeprefix("step-"))
    more = overrides(tmp_path, "told", f"training.steps={made + 1}", "training.checkpoint_every=1000")
    again = subprocess.run([*command, *more, "--resume"], capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == ExitCode.DONE, again.stderr
    assert f"step {made + 1}/{made + 1}" in again.stderr
    assert f"step {made}/" not in again.stderr
