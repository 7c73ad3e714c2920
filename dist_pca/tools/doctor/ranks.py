"""What only ranks together can say: who is there, how fast they exchange, what they share, what their clocks show."""

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from dist_pca.distributed import gather_objects
from dist_pca.tools.doctor.check import Check, Verdict, merge, name_ranks

SLOW = {"gloo": 0.02e9, "nccl": 2e9}
"""Bytes per second of bus bandwidth below which something is wrong rather than slow."""
_MESSAGE = {"gloo": 16 << 20, "nccl": 256 << 20}
_REPEATS = 5
_SKEW_WARNS, _SKEW_FAILS = 1.0, 30.0
SEEN_WITHIN = 10.0
"""Seconds in which a file must show up on other nodes; network file systems keep listings for a while."""
_NCCL_REMEDY = "set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME to the fast network, and look for IB or EFA in what it says"
_GLOO_REMEDY = "set GLOO_SOCKET_IFNAME to the network that joins the nodes"


class Ranks(NamedTuple):
    """This process among those that came."""

    rank: int
    size: int
    hosts: list[str]
    """Host name of each rank."""


class SomeAreMissing(Exception):
    """Not all ranks came; the check says which.

    Args:
        check: What to say.
        hosts: Of each rank that is known to be there, this one included.
        by_all: Rank 0 is not there to say it.
    """

    def __init__(self, check: Check, hosts: list[str], *, by_all: bool = False) -> None:
        super().__init__(check.found)
        self.check, self.hosts, self.by_all = check, hosts, by_all


def join(wait: float) -> Ranks:
    """Meet the other ranks that the launcher announced, and start gloo among them; alone if there is no launcher.

    Args:
        wait: Seconds after which those who are not there are missing.

    Raises:
        SomeAreMissing: with the check that names them; on every rank that came.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host = socket.gethostname()
    if size == 1:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        return Ranks(0, 1, [host])
    store = PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", _meeting_point(rank, host, wait))
    store.set(f"here/{rank}", host)
    hosts = _call_roll(store, size, wait) if rank == 0 else _hear_roll(store, rank, host, size, wait)
    # A rank that dies from here on ends the collective that the others wait in.
    timeout = timedelta(seconds=wait)
    try:
        dist.init_process_group("gloo", store=PrefixStore("gloo", store), rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        lost = f"a rank was lost, or a link does not carry gloo: {str(error).splitlines()[0]}"
        raise SomeAreMissing(Check("ranks", "fail", lost, _GLOO_REMEDY), hosts, by_all=True) from None
    return Ranks(rank, size, hosts)


def _meeting_point(rank: int, host: str, wait: float) -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # The launcher's own process keeps the store, if it says so; else rank 0 does.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(address, port, is_master=is_master, timeout=timedelta(seconds=wait), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise SomeAreMissing(
            Check(
                "ranks",
                "fail",
                f"rank {rank} on {host} cannot reach {address}:{port}: {str(error).splitlines()[0]}",
                "open the port between the nodes, or give --main_process_ip an address that all of them reach",
            ),
            [host],
            by_all=True,
        ) from None


def _call_roll(store: Store, size: int, wait: float) -> list[str]:
    deadline = time.monotonic() + wait
    missing = list(range(size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        time.sleep(0.05)
    present = [rank for rank in range(size) if rank not in missing]
    hosts = {rank: store.get(f"here/{rank}").decode() for rank in present}
    if not missing:
        store.set("roll", "all")
        return [hosts[rank] for rank in range(size)]
    names = ", ".join(map(str, missing))
    found = (
        f"rank{'s' * (len(missing) > 1)} {names} of {size} did not come within {wait:g} s; "
        f"those who came are on {', '.join(sorted(set(hosts.values())))}"
    )
    store.set("roll", found)
    # The store may end with this process, so it stays until the others have heard.
    with suppress(RuntimeError):
        store.wait([f"heard/{rank}" for rank in present if rank != 0], timedelta(seconds=5))
    raise SomeAreMissing(_absence(found), list(hosts.values()))


def _hear_roll(store: Store, rank: int, host: str, size: int, wait: float) -> list[str]:
    # Rank 0 may have begun to wait later than this one.
    store.set_timeout(timedelta(seconds=2 * wait + 5))
    try:
        heard = store.get("roll").decode()
    except RuntimeError:
        absence = _absence(f"rank 0 of {size} did not come within {2 * wait + 5:g} s")
        raise SomeAreMissing(absence, [host], by_all=True) from None
    if heard != "all":
        store.set(f"heard/{rank}", "")
        raise SomeAreMissing(_absence(heard), [host])
    return [store.get(f"here/{other}").decode() for other in range(size)]


def _absence(found: str) -> Check:
    return Check(
        "ranks",
        "fail",
        found,
        "start the same number of processes on every machine with their own --machine_rank, and look into the logs of "
        "those that are missing",
    )


def start_nccl(ranks: Ranks, wait: float) -> dist.ProcessGroup | None:
    """A group over NCCL, if every rank has a GPU of its own. Collective."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    able = torch.tensor(int(torch.cuda.is_available() and local_rank < torch.cuda.device_count()))
    dist.all_reduce(able, op=dist.ReduceOp.MIN)
    if not able:
        return None
    torch.cuda.set_device(local_rank)
    return dist.new_group(backend="nccl", timeout=timedelta(seconds=wait))  # type: ignore[return-value]


def common_checks(ranks: Ranks, own: Sequence[Check], folder: Path | None, wait: float) -> list[Check]:
    """Every rank's own checks, merged, and those that all make together. Collective; the ranks part afterwards."""
    checks = merge(gather_objects(own), ranks.hosts)
    checks += exchange_checks(ranks, "gloo", None)
    nccl = start_nccl(ranks, wait)
    if nccl is not None:
        checks += exchange_checks(ranks, "nccl", nccl)
    if folder is not None:
        checks.append(shared_folder(ranks, folder))
    checks.append(clocks(ranks))
    dist.barrier()
    dist.destroy_process_group()
    return checks


def exchange_checks(ranks: Ranks, backend: str, group: dist.ProcessGroup | None) -> list[Check]:
    """An all-reduce and an all-gather: whether their results are right, and their bandwidth. Collective."""
    device = torch.device("cuda") if backend == "nccl" else torch.device("cpu")
    elements = _MESSAGE[backend] // 4 // ranks.size * ranks.size
    own = torch.empty(elements, device=device)
    part = torch.full((elements // ranks.size,), float(ranks.rank + 1), device=device)
    everyone = [torch.empty_like(part) for _ in range(ranks.size)]

    def reduced() -> bool:
        own.fill_(ranks.rank + 1)
        dist.all_reduce(own, group=group)
        return bool((own == ranks.size * (ranks.size + 1) / 2).all())

    def gathered() -> bool:
        dist.all_gather(everyone, part, group=group)
        return all(bool((theirs == rank + 1).all()) for rank, theirs in enumerate(everyone))

    sent = 4 * elements * (ranks.size - 1) / ranks.size
    return [
        _timed(f"{backend} all-reduce", backend, ranks, 2 * sent, reduced),
        _timed(f"{backend} all-gather", backend, ranks, sent, gathered),
    ]


def _timed(name: str, backend: str, ranks: Ranks, sent: float, call: Callable[[], bool]) -> Check:
    remedy = _NCCL_REMEDY if backend == "nccl" else _GLOO_REMEDY
    seconds, right = [], True
    try:
        for _ in range(_REPEATS):
            dist.barrier()
            start = time.perf_counter()
            right &= call()
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        return Check(name, "fail", str(error).splitlines()[0], remedy)
    if not right:
        return Check(name, "fail", "its result is wrong", "update the driver and NCCL; test each node's GPUs alone")
    if ranks.size == 1:
        return Check(name, "pass", "works on one rank; bandwidth needs several, under accelerate launch")
    bandwidth = sent / statistics.median(seconds)
    found = f"{bandwidth / 1e9:.2f} GB/s from each of {ranks.size} ranks on {len(set(ranks.hosts))} hosts"
    return Check(name, "warn", found, remedy) if bandwidth < SLOW[backend] else Check(name, "pass", found)


def _remove_probe(probe: Path, new: bool) -> None:
    with suppress(OSError):
        probe.unlink(missing_ok=True)
        if new:
            probe.parent.rmdir()


def shared_folder(ranks: Ranks, folder: Path) -> Check:
    """Whether a file that rank 0 writes shows up on every rank. Collective."""
    name, token, why = "shared folder", [""], ""
    probe, new = folder / f".doctor-{uuid4().hex}", not folder.exists()
    if ranks.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text(probe.name)
            token = [probe.name]
        except OSError as error:
            why = error.strerror or str(error)
            _remove_probe(probe, new)
    dist.broadcast_object_list(token)
    if not token[0]:
        remedy = "fix its permissions, free space, or give another folder"
        return Check(name, "fail", f"rank 0 cannot write to {folder}: {why}", remedy)
    deadline, seen = time.monotonic() + SEEN_WITHIN, False
    while not seen and time.monotonic() < deadline:
        with suppress(OSError):
            seen = (folder / token[0]).read_text() == token[0]
        if not seen:
            time.sleep(0.1)
    everyone = gather_objects(seen)
    if ranks.rank == 0:
        _remove_probe(probe, new)
    blind = [rank for rank, sees in enumerate(everyone) if not sees]
    if blind:
        return Check(
            name,
            "fail",
            f"{folder}: what rank 0 writes is not seen by {name_ranks(blind, ranks.hosts)}",
            "name a folder on a file system that all nodes mount at the same place",
        )
    return Check(name, "pass", f"{folder.absolute()} is seen by {ranks.size} rank{'s' * (ranks.size > 1)}")


def clocks(ranks: Ranks) -> Check:
    """Check how far ranks' clocks differ, read right after a barrier; the best of several reads. Collective."""
    spreads = []
    for _ in range(_REPEATS):
        dist.barrier()
        told = gather_objects(time.time())
        spreads.append((max(told) - min(told), told))
    spread, told = min(spreads)
    found = f"{1000 * spread:.0f} ms apart at most"
    if spread < _SKEW_WARNS:
        return Check("clocks", "pass", found)
    off = max(range(ranks.size), key=lambda rank: abs(told[rank] - statistics.median(told)))
    verdict: Verdict = "fail" if spread > _SKEW_FAILS else "warn"
    return Check(
        "clocks",
        verdict,
        f"{spread:.1f} s apart, {name_ranks([off], ranks.hosts)} most",
        "let chrony or ntpd set the clocks: locks and logs of different nodes are compared by time",
    )
