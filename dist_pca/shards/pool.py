"""Writing shards in several processes that stop together: on an error, on Ctrl-C, and when the parent is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

from dist_pca.errors import UserError
from dist_pca.shards.manifest import Shard
from dist_pca.shards.writer import ShardJob, write_shard

Progress = Callable[[int, int, int], None]
_POLL_SECONDS = 0.1


class _Stopped(Exception):
    """Raised in a worker whose build has failed elsewhere."""


@dataclass(frozen=True)
class _Shared:
    """What workers and parent share: samples and bytes done, and the order to stop."""

    samples: "Synchronized[int]"
    stored: "Synchronized[int]"
    stop: Event


def run_jobs(jobs: Sequence[ShardJob], workers: int, progress: Progress | None) -> list[Shard]:
    """Write shards, in this process if one worker is enough, and return their descriptions in the jobs' order.

    Raises:
        UserError: a sample is refused, or a worker was killed.
        OSError: the disk does not take a shard.
    """
    total = sum(len(job.samples) for job in jobs)
    tell = progress or (lambda samples, total, stored: None)
    tell(0, total, 0)
    workers = min(workers, len(jobs))
    return _run_here(jobs, total, tell) if workers == 1 else _run_pool(jobs, workers, total, tell)


def _run_here(jobs: Sequence[ShardJob], total: int, tell: Progress) -> list[Shard]:
    samples = stored = 0

    def report(size: int) -> None:
        nonlocal samples, stored
        samples, stored = samples + 1, stored + size
        tell(samples, total, stored)

    return [write_shard(job, report) for job in jobs]


def _run_pool(jobs: Sequence[ShardJob], workers: int, total: int, tell: Progress) -> list[Shard]:
    # Spawned, because a progress bar's thread may hold locks at the time of a fork.
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Value("q", 0), context.Event())
    with ProcessPoolExecutor(workers, context, _start_worker, (shared,)) as pool:
        futures = [pool.submit(_work, job) for job in jobs]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                # Read without the locks, which a killed worker may hold for ever.
                tell(shared.samples.get_obj().value, total, shared.stored.get_obj().value)
        except BrokenProcessPool:
            raise UserError("a worker was killed, most likely for want of memory; use fewer --workers") from None
        except BaseException:
            shared.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


_worker: _Shared


def _start_worker(shared: _Shared) -> None:
    global _worker
    _worker = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: ShardJob) -> Shard:
    return write_shard(job, _report)


def _report(size: int) -> None:
    if _worker.stop.is_set():
        raise _Stopped
    with _worker.samples.get_lock():
        _worker.samples.value += 1
    with _worker.stored.get_lock():
        _worker.stored.value += size
