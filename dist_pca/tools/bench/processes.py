"""Fresh processes for measurements: what one leaves in memory cannot flatter or burden the next."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


class OutOfMemory(Exception):
    """A measured call needed more memory than there is."""


def in_fresh_processes(function: Callable[..., T], processes: int, *args: object) -> list[T]:
    """`function(rank, *args)` in that many new processes at once; what each returned, by rank.

    The function must be importable, its arguments and result picklable. The others end as soon as one fails.

    Raises:
        OutOfMemory: a process ran out of memory, or the system killed it for that.
        RuntimeError: a process failed otherwise; the message holds its traceback.
    """
    context = multiprocessing.get_context("spawn")
    running: list[Any] = []
    waiting: dict[Connection, int] = {}
    try:
        for rank in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(sender, function, rank, args), daemon=True)
            process.start()
            sender.close()
            running.append(process)
            waiting[receiver] = rank
        results: dict[int, T] = {}
        while waiting:
            ready = wait(list(waiting))
            for receiver in [receiver for receiver in waiting if receiver in ready]:
                rank = waiting.pop(receiver)
                results[rank] = _received(receiver, running[rank], rank)
        return [results[rank] for rank in range(processes)]
    finally:
        for process in running:
            process.kill()
            process.join()


def _received(receiver: Connection, process: Any, rank: int) -> Any:
    try:
        outcome, value = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise OutOfMemory(f"rank {rank} was killed") from None
        raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
    if outcome == "out of memory":
        raise OutOfMemory(f"rank {rank}: {value}")
    if outcome == "error":
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _call(sender: Connection, function: Callable[..., Any], rank: int, args: tuple[Any, ...]) -> None:
    # Libraries print while ranks meet; standard output belongs to the command's JSON.
    os.dup2(2, 1)
    try:
        sender.send(("result", function(rank, *args)))
    except Exception as error:
        # By its words, because torch has no type for it on the CPU.
        if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            sender.send(("out of memory", str(error)))
        else:
            sender.send(("error", traceback.format_exc()))
