"""Faults between ranks, each really made."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_pca.resources import resource
from dist_pca.tools.doctor import ranks as meeting
from dist_pca.tools.doctor.ranks import Ranks
from tests.support.disk import small_disk
from tests.support.ranks import run_on_ranks


def one_sees_another_folder(rank: int, world_size: int, folder: Path) -> list[str]:
    meeting.SEEN_WITHIN = 1.0
    check = meeting.shared_folder(Ranks(rank, world_size, ["a", "b"]), folder / str(rank))
    return [check.verdict, check.found]


def all_see_one_folder(rank: int, world_size: int, folder: Path) -> list[str]:
    check = meeting.shared_folder(Ranks(rank, world_size, ["a", "b"]), folder / "runs")
    return [check.verdict, check.found]


def one_clock_is_ahead(rank: int, world_size: int, seconds: float) -> list[str]:
    sound = time.time
    time.time = lambda: sound() + seconds * (rank == 2)
    check = meeting.clocks(Ranks(rank, world_size, ["a", "a", "b"]))
    return [check.verdict, check.found]


def exchange(rank: int, world_size: int) -> list[list[str]]:
    checks = meeting.exchange_checks(Ranks(rank, world_size, ["a", "b"]), "gloo", None)
    return [[check.verdict, check.found] for check in checks]


@pytest.mark.slow
def test_a_folder_that_one_node_lacks_fails_and_names_it(tmp_path: Path) -> None:
    for verdict, found in run_on_ranks(one_sees_another_folder, 2, tmp_path, tmp_path / "own"):
        assert verdict == "fail"
        assert found.endswith("is not seen by rank 1 on b")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_folder_that_all_see_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    for verdict, _ in run_on_ranks(all_see_one_folder, 2, tmp_path, tmp_path):
        assert verdict == "pass"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        (90.0, "fail"),
        pytest.param(0.0, "pass", marks=pytest.mark.exhaustive),
        pytest.param(7.0, "warn", marks=pytest.mark.exhaustive),
    ],
)
def test_a_clock_that_is_ahead_is_named(seconds: float, verdict: str, tmp_path: Path) -> None:
    found = run_on_ranks(one_clock_is_ahead, 3, tmp_path, seconds)
    assert [line[0] for line in found] == [verdict] * 3
    if verdict != "pass":
        assert "rank 2 on b" in found[0][1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_bandwidth_is_measured_and_results_are_right(tmp_path: Path) -> None:
    for verdict, found in run_on_ranks(exchange, 2, tmp_path)[0]:
        assert verdict in ("pass", "warn")
        assert "GB/s from each of 2 ranks on 2 hosts" in found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ranks_that_do_not_come_are_named_in_time() -> None:
    start = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "LOCAL_RANK": "0"}
    environment = os.environ | start
    command = [sys.executable, "-m", "dist_pca.doctor", "--wait", "10", "--json"]
    began = time.monotonic()
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "2")
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert time.monotonic() - began < 90
    assert ranks[0].returncode == 1
    told = json.loads(outputs[0])
    assert (told["ranks"], told["present"], len(told["hosts"])) == (3, 2, 2)
    missing = told["checks"][-1]
    assert missing["name"] == "ranks"
    assert missing["verdict"] == "fail"
    assert missing["found"].startswith("rank 1 of 3 did not come within 10 s")
    assert outputs[1] == ""


def examine_launched(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of two ranks under `accelerate launch`."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(resource("launch", "accelerate/cpu"))),
        *("-m", "dist_pca.doctor", "--json", *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    told = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert (told["ranks"], told["present"]) == (2, 2)
    return done.returncode, told


@pytest.mark.slow
def test_two_launched_ranks_are_examined_together(tmp_path: Path) -> None:
    code, told = examine_launched("--shared", str(tmp_path))
    assert code == 0
    assert told["fit"]
    names = [check["name"] for check in told["checks"]]
    assert {"versions", "gpus", "gloo all-reduce", "gloo all-gather", "shared folder", "clocks", "disk"} <= set(names)


@pytest.mark.slow
def test_little_space_warns_and_missing_shards_fail_on_launched_ranks(tmp_path: Path) -> None:
    # More than nothing, less than a run may need.
    with small_disk(tmp_path / "disk", "2g") as disk:
        code, told = examine_launched("demo", f"data.source={disk}/none", "--shared", str(disk))
    assert code == 1
    assert not told["fit"]
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["versions"]["verdict"] == checks["shared folder"]["verdict"] == "pass"
    assert checks["disk"]["verdict"] == "warn"
    assert "choose another output=" in checks["disk"]["remedy"]
    assert checks["source shards"]["verdict"] == "fail"
    assert "dist-pca shards build" in checks["source shards"]["remedy"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_alone_with_shards_that_are_missing_it_fails_with_the_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_pca.cli", "doctor", "demo", f"data.source={tmp_path}/none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "source shards" in done.stdout
    assert "dist-pca shards build" in " ".join(done.stdout.split())
