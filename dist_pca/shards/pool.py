"""Process shards in a pool of workers that stops as a whole: on an error, on Ctrl-C, or when the parent is killed."""

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
from typing import TypeVar

from dist_pca.cores import usable_cores
from dist_pca.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, int], None]
"""Called by a job from time to time with samples and bytes done since the last call. It may raise to stop the job."""
Progress = Callable[[int, int, int], None]
"""Called from time to time with samples done, samples in total, and bytes done."""
_POLL_SECONDS = 0.1


class _Stopped(Exception):
    """Raised in a worker when another worker has failed."""


@dataclass(frozen=True)
class _Shared:
    """State shared by workers and parent: samples and bytes done, and the stop flag."""

    samples: "Synchronized[int]"
    stored: "Synchronized[int]"
    stop: Event


def run_jobs(
    work: Callable[[Job, Report], Result],
    jobs: Sequence[Job],
    *,
    total: int,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Run jobs, in this process if one worker is enough, and return their results in the order of the jobs.

    Args:
        work: A module-level function of a job and a `Report`.
        jobs: The jobs; jobs and results must be picklable.
        total: Samples in all jobs.
        workers: Processes; None is one per core that this process may use.
        progress: Called in this process.

    Raises:
        UserError: a worker was killed. Exceptions of `work` are raised too.
    """
    tell = progress or (lambda samples, total, stored: None)
    tell(0, total, 0)
    workers = min(workers or usable_cores(), len(jobs))
    return _run_here(work, jobs, total, tell) if workers <= 1 else _run_pool(work, jobs, workers, total, tell)


def _run_here(work: Callable[[Job, Report], Result], jobs: Sequence[Job], total: int, tell: Progress) -> list[Result]:
    samples = stored = 0

    def report(more: int, size: int) -> None:
        nonlocal samples, stored
        samples, stored = samples + more, stored + size
        tell(samples, total, stored)

    return [work(job, report) for job in jobs]


def _run_pool(
    work: Callable[[Job, Report], Result], jobs: Sequence[Job], workers: int, total: int, tell: Progress
) -> list[Result]:
    # Spawn, because a progress bar's thread may hold locks at the time of a fork.
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Value("q", 0), context.Event())
    with ProcessPoolExecutor(workers, context, _start_worker, (shared,)) as pool:
        try:
            # Workers start while jobs are submitted, and inherit the blocked SIGINT: Ctrl-C reaches the whole group.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(work, job, _report) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            pending = set(futures)
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                # Read without the locks, which a killed worker may never release.
                tell(shared.samples.get_obj().value, total, shared.stored.get_obj().value)
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, most likely because memory ran out; lower --workers. In a script, calls that "
                'start workers belong under `if __name__ == "__main__":`'
            ) from None
        except BaseException:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


_worker: _Shared


def _start_worker(shared: _Shared) -> None:
    global _worker
    _worker = shared
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _report(samples: int, stored: int) -> None:
    if _worker.stop.is_set():
        raise _Stopped
    with _worker.samples.get_lock():
        _worker.samples.value += samples
    with _worker.stored.get_lock():
        _worker.stored.value += stored
