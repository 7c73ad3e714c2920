"""Two jobs never train in one run folder, and a job that is gone holds it from nobody."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from dist_pca.errors import UserError
from dist_pca.resilience import lock
from dist_pca.resilience.lock import run_lock
from tests.support.disk import small_disk


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def held_by(folder: Path, host: str, pid: int, started: float, processes: str | None = None) -> Path:
    with run_lock(folder):
        owner = json.loads((folder / "lock.json").read_text())
    owner |= {"host": host, "pid": pid, "started": started}
    (folder / "lock.json").write_text(json.dumps(owner | ({"processes": processes} if processes else {})))
    return folder / "lock.json"


def test_a_folder_is_held_while_training_and_free_afterwards(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / "lock.json").read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()} trains in this folder"):
            run_lock(tmp_path / "run").__enter__()
        assert (tmp_path / "run" / "lock.json").exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_living_process_of_this_machine_keeps_its_lock_however_silent(
    tmp_path: Path, other: "subprocess.Popen[bytes]"
) -> None:
    path = held_by(tmp_path, socket.gethostname(), other.pid, psutil.Process(other.pid).create_time())
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match=f"process {other.pid} on"), run_lock(tmp_path):
        pass
    assert json.loads(path.read_text())["pid"] == other.pid


def test_a_killed_process_leaves_a_lock_that_is_taken_over(tmp_path: Path, other: "subprocess.Popen[bytes]") -> None:
    started = psutil.Process(other.pid).create_time()
    other.send_signal(signal.SIGKILL)
    # Not waited for: a dead process whose parent has not looked counts as dead too.
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    path = held_by(tmp_path, socket.gethostname(), other.pid, started)
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_has_now_is_not_the_owner(
    tmp_path: Path, other: "subprocess.Popen[bytes]"
) -> None:
    path = held_by(tmp_path, socket.gethostname(), other.pid, psutil.Process(other.pid).create_time() - 100)
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_machines_lock_is_taken_over_once_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.5)
    path = held_by(tmp_path, "elsewhere", 1, 0.0)
    began = time.monotonic()
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert time.monotonic() - began >= 1.5


@pytest.mark.parametrize(("host", "processes"), [("elsewhere", None), (socket.gethostname(), "another container's")])
def test_another_machines_lock_that_is_touched_is_respected(tmp_path: Path, host: str, processes: str | None) -> None:
    path = held_by(tmp_path, host, 999_999_999, 0.0, processes)
    threading.Timer(0.3, os.utime, [path]).start()
    with pytest.raises(UserError, match=f"process 999999999 on {host} trains in this folder"), run_lock(tmp_path):
        pass


def test_a_start_with_patience_waits_for_a_job_that_is_leaving(
    tmp_path: Path, other: "subprocess.Popen[bytes]"
) -> None:
    path = held_by(tmp_path, socket.gethostname(), other.pid, psutil.Process(other.pid).create_time())
    threading.Timer(1.5, path.unlink).start()
    with run_lock(tmp_path, wait=60):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    held_by(tmp_path, "elsewhere", 999_999_999, 0.0)
    threading.Timer(0.3, os.utime, [path]).start()
    refused = pytest.raises(UserError, match="process 999999999 on elsewhere trains in this folder")
    began = time.monotonic()
    with refused, run_lock(tmp_path, wait=2):
        pass
    assert time.monotonic() - began >= 2


@pytest.mark.parametrize("content", ["", "nonsense", "[1, 2]"])
def test_a_lock_that_names_no_process_is_taken_over_soon_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    monkeypatch.setattr(lock, "UNREADABLE_SECONDS", 0.5)
    path = tmp_path / "lock.json"
    path.write_text(content)
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "taking it over" in caplog.text


def test_waiting_says_for_what_and_is_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = held_by(tmp_path, "elsewhere", 999_999_999, 0.0)
    threading.Timer(1.5, path.unlink).start()
    progress = []
    with caplog.at_level("INFO", "dist_pca.training"), run_lock(tmp_path, waiting=lambda: progress.append(1)):
        pass
    assert caplog.messages == [
        f"{path}: of process 999999999 on elsewhere; waiting until it is released, or untouched for 60 s"
    ]
    assert progress


def test_a_full_disk_leaves_no_lock(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="64k") as folder:
        with (folder / "ballast").open("wb") as ballast, suppress(OSError):
            ballast.write(bytes(2**20))
        with pytest.raises(UserError, match=r"lock\.json: cannot be written \(.*No space"), run_lock(folder):
            pass
        assert [path.name for path in folder.iterdir()] == ["ballast"]
        (folder / "ballast").unlink()
        with run_lock(folder):
            pass


def test_without_hard_links_the_lock_still_excludes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="trains in this folder"):
            run_lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_held_lock_is_touched_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    with run_lock(tmp_path):
        os.utime(tmp_path / "lock.json", (0, 0))
        time.sleep(0.5)
        assert (tmp_path / "lock.json").stat().st_mtime > 0
