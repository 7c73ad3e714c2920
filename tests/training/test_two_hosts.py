"""Two hosts, each a network namespace with an address and a name of its own, and the link between them cut."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_pca.resilience.exit_status import ExitCode
from dist_pca.resources import resource
from tests.support.runs import build_streets, overrides

HOSTS = ("dist-pca-a", "dist-pca-b")
LINKS = ("pca-a", "pca-b")
FIRST_ADDRESS = "10.77.31.1"
KEYS = ("training.steps=40", "training.checkpoint_every=10", "data.workers=0")
STALL_TIMEOUT = 20


def ip(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


def why_not() -> str | None:
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces want root"
    try:
        made = ip("netns", "add", "dist-pca-probe", check=False)
        ip("netns", "del", "dist-pca-probe", check=False)
    except FileNotFoundError:
        return "iproute2 is not installed"
    return made.stderr.strip() or None


REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


@pytest.fixture
def hosts() -> Iterator[None]:
    for host in HOSTS:
        ip("netns", "del", host, check=False)
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    ip("link", "add", LINKS[0], "netns", HOSTS[0], "type", "veth", "peer", "name", LINKS[1], "netns", HOSTS[1])
    for number, (host, link) in enumerate(zip(HOSTS, LINKS, strict=True), start=1):
        ip("-n", host, "addr", "add", f"10.77.31.{number}/24", "dev", link)
        ip("-n", host, "link", "set", link, "up")
    yield
    for host in HOSTS:
        ip("netns", "del", host)


def start(folder: Path, name: str) -> list["subprocess.Popen[str]"]:
    """The command for each machine, as the head of launch/accelerate/multi_node.yaml gives it, on CPUs."""
    settings = yaml.safe_load(resource("launch", "accelerate/multi_node").read_text())
    config = folder / "two_hosts.yaml"
    config.write_text(yaml.safe_dump(settings | {"use_cpu": True, "num_processes": 2}))
    processes = []
    for rank, (host, link) in enumerate(zip(HOSTS, LINKS, strict=True)):
        inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--machine_rank", str(rank), "--main_process_ip", FIRST_ADDRESS, "-m", "dist_pca.train", "demo"]
        keys = overrides(folder, name, *KEYS, f"training.stall_timeout={STALL_TIMEOUT}")
        log = (folder / f"{name}-{rank}.log").open("a")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        processes.append(
            subprocess.Popen([*inside, *launcher, *keys], env=environment, stdout=log, stderr=log, text=True)
        )
    return processes


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_link_that_comes_back_in_time_costs_nothing_and_one_that_does_not_ends_both_sides(
    hosts: None, tmp_path: Path
) -> None:
    build_streets(tmp_path)
    run = tmp_path / "runs" / "apart"

    def steps() -> int:
        lines = run / "metrics.jsonl"
        return len(lines.read_text().splitlines()) if lines.is_file() else 0

    processes = start(tmp_path, "apart")
    try:
        wait_until(lambda: steps() >= 3, 120)
        ip("-n", HOSTS[0], "link", "set", LINKS[0], "down")
        time.sleep(3)
        ip("-n", HOSTS[0], "link", "set", LINKS[0], "up")
        wait_until(lambda: steps() >= 12, 60)

        ip("-n", HOSTS[0], "link", "set", LINKS[0], "down")
        for process in processes:
            assert process.wait(STALL_TIMEOUT + 40) != 0
        assert json.loads((run / "exit.json").read_text())["code"] == ExitCode.LOST_RANK
        said = [(tmp_path / f"apart-{rank}.log").read_text() for rank in (0, 1)]
        assert f"rank 1 ({HOSTS[1]}" in said[0]
        assert "rank 1: the launcher's store has not answered" in said[1]

        ip("-n", HOSTS[0], "link", "set", LINKS[0], "up")
        processes = start(tmp_path, "apart")
        assert [process.wait(120) for process in processes] == [0, 0]
        processes = start(tmp_path, "unbroken")
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    apart, unbroken = (
        load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000040" / "model.safetensors")
        for name in ("apart", "unbroken")
    )
    assert all(torch.equal(apart[name], value) for name, value in unbroken.items())
