"""A SLURM cluster of two nodes on this machine, with daemons, key and state of its own in one folder."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
INSTALL = "DIST_PCA_INSTALL_SLURM"
"""Environment variable that consents to `apt-get install`."""
ROOT = Path(__file__).parents[2]
# Debian puts daemons where users need not look.
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster(NamedTuple):
    """A cluster that runs."""

    folder: Path
    environment: dict[str, str]
    """With which SLURM's commands find it, and its jobs this code."""
    nodes: dict[str, "subprocess.Popen[bytes]"]

    def call(self, *command: object, **variables: str) -> str:
        """Standard output of a command that runs in the cluster's folder."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        shown = self.call("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is in one of these states, and give what SLURM knows of it."""
        wait_until(lambda: self.job(number)["JobState"] in states, seconds, lambda: str(self.job(number)))
        return self.job(number)

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Those of this cluster's jobs that have these environment variables."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"]} | variables
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted.items() <= process.environ().items():
                    found.append(process)
        return found

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.nodes[name] = _start(self.folder, self.environment, f"slurmd-{name}", "slurmd", "-D", "-N", name)

    def kill_daemon(self, name: str) -> None:
        """Kill a node's daemon; what runs there runs on."""
        self.nodes[name].kill()
        self.nodes[name].wait()

    def cut_power(self, name: str) -> None:
        """Kill a node's daemon and all that runs there."""
        self.kill_daemon(name)
        for process in self.processes(SLURMD_NODENAME=name):
            with suppress(psutil.Error):
                for member in (process, process.parent()):
                    if member is not None and (member is process or member.name().startswith("slurmstepd")):
                        member.kill()


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put an `sbatch` before all others that is these lines of shell."""
    (folder / "bin").mkdir()
    (folder / "bin/sbatch").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def wait_until(true: Callable[[], bool], seconds: float, shown: Callable[[], str] = str) -> None:
    """Wait until something is so, or fail and say how things are."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, shown()
        time.sleep(0.1)


def missing_programs() -> str:
    """Why there can be no cluster here; empty where there can."""
    if all(map(_find, PROGRAMS)):
        return ""
    if not os.environ.get(INSTALL):
        return f"no SLURM here: install slurm-wlm and munge, or set {INSTALL}=1 to have apt-get do it"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no SLURM here, and no apt-get or no right to install it"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (("update",), ("install", "-y", "--no-install-recommends", "slurm-wlm", "munge")):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"no SLURM here, and apt-get {command[0]} failed: {done.stderr[-300:]}"
    return ""


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the cluster, and stop it with all that it runs."""
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o400)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(_configuration(folder))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment |= {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "PYTHONPATH": str(ROOT),
    }
    cluster = Cluster(folder, environment, {})
    daemons = []
    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    try:
        daemons.append(_start(folder, environment, "munged", "munged", "--foreground", "--force", *files))
        wait_until((folder / "munge.socket").exists, 10, (folder / "munged.log").read_text)
        daemons.append(_start(folder, environment, "slurmctld", "slurmctld", "-D"))
        for name in NODES:
            cluster.start_node(name)
        wait_until(lambda: _idle_nodes(cluster) == len(NODES), 60, (folder / "slurmctld.log").read_text)
        yield cluster
    finally:
        daemons += cluster.nodes.values()
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, capture_output=True, check=False)
        for process in cluster.processes():
            if process.pid not in {daemon.pid for daemon in daemons}:
                with suppress(psutil.Error):
                    process.kill()
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _configuration(folder: Path) -> str:
    controller, *ports = _free_ports(1 + len(NODES))
    user = getpass.getuser()
    nodes = [
        # More than the machine has, so that several jobs can run at once.
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    ]
    return "\n".join(
        [
            *("ClusterName=test", "SlurmctldHost=localhost(127.0.0.1)", f"SlurmctldPort={controller}"),
            *(f"SlurmUser={user}", f"SlurmdUser={user}", "SlurmdParameters=config_overrides"),
            # A job that is requeued waits until its credentials cannot be valid any more.
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SwitchType=switch/none", "MpiDefault=none"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "SchedulerParameters=sched_interval=1"),
            *("GresTypes=gpu", "ReturnToService=2", "SlurmdTimeout=5", "KillWait=30", "InactiveLimit=0"),
            *(f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool-%n"),
            *(f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd-%n.pid"),
            *nodes,
            f"PartitionName=all Nodes={','.join(NODES)} Default=YES State=UP",
            "",
        ]
    )


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _find(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


def _start(folder: Path, environment: dict[str, str], name: str, *command: str) -> "subprocess.Popen[bytes]":
    path = _find(command[0])
    assert path is not None
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([path, *command[1:]], env=environment, stdout=log, stderr=log)


def _idle_nodes(cluster: Cluster) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format", "%t"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")
