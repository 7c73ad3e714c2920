"""Downloads of remote shards that survive a flaky connection, and give up on a server that drips."""

import queue
import threading
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from random import SystemRandom
from typing import IO, NamedTuple

from dist_pca.data.addresses import redact
from dist_pca.data.bodies import BadRange, TransientError, open_body
from dist_pca.errors import UserError

_LONGEST_WAIT = 30.0
_POLL = 0.05
_QUEUED = 16
"""Number of chunks that are received before they are written."""


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of a download."""

    timeout: float = 30.0
    """Seconds without any data after which an attempt fails."""
    retries: int = 6
    """Number of attempts after the first one."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled for each later one up to 30, and reduced at random by up to half."""
    min_rate: float = 10_000.0
    """Bytes per second, on average over `rate_window`, below which an attempt fails too; 0 has no limit."""
    rate_window: float = 60.0
    """Seconds over which the rate is measured."""


class Cancelled(Exception):
    """Raised when a download is cancelled by its caller."""


def download(
    url: str, file: IO[bytes], *, most: int, retry: RetryPolicy, cancelled: threading.Event | None = None
) -> None:
    """Download an object into a file; an interrupted transfer resumes at its offset, if the server supports it.

    Args:
        url: URL for which `is_remote` is true.
        file: Seekable file; afterwards it contains the object only.
        most: Size limit of the object, in bytes.
        retry: Retry policy.
        cancelled: Stops the download once it is set.

    Raises:
        UserError: the object is missing, forbidden or larger than `most`, or all attempts have failed.
        OSError: the file cannot be written.
        Cancelled: `cancelled` was set.
    """
    cancelled = cancelled or threading.Event()
    # Do not advance Python's global generator: training code may draw from it.
    jitter = SystemRandom()
    file.seek(0)
    for attempt in range(retry.retries + 1):
        try:
            _transfer(url, file, most, retry, cancelled)
            file.truncate()
            return
        except TransientError as error:
            if attempt == retry.retries:
                raise UserError(
                    f"{redact(url)}: {error}, {attempt + 1} attempts; check that the server is reachable and restart"
                ) from None
            if isinstance(error, BadRange):
                file.seek(0)
        cancelled.wait(min(retry.backoff * 2**attempt, _LONGEST_WAIT) * jitter.uniform(0.5, 1.0))


def _transfer(url: str, file: IO[bytes], most: int, retry: RetryPolicy, cancelled: threading.Event) -> None:
    with closing(_received(url, file.tell(), retry, cancelled)) as items:
        for item in items:
            if isinstance(item, _Start):
                file.seek(item.offset)
                continue
            if file.tell() + len(item) > most:
                raise UserError(
                    f"{redact(url)}: larger than the limit of {most} bytes; the file was changed or is not part of a "
                    "shard folder: check the location, or upload the folder again"
                )
            file.write(item)


class _Start(NamedTuple):
    offset: int


def _received(
    url: str, start: int, retry: RetryPolicy, cancelled: threading.Event
) -> Generator[_Start | bytes, None, None]:
    """Yield where an object's body begins, and then its bytes, as long as they come at the least rate.

    A thread receives them. A server that sends a byte before every timeout holds a read, or the headers, for ever,
    which no timeout of a socket ends; the thread is then left behind and ends with the connection.
    """
    items: queue.Queue[_Start | bytes | BaseException | None] = queue.Queue(_QUEUED)
    left = threading.Event()
    thread = threading.Thread(target=_receive, args=(url, start, retry.timeout, items, left), daemon=True)
    thread.start()
    since, count = time.monotonic(), 0
    try:
        while True:
            if cancelled.is_set():
                raise Cancelled
            if retry.min_rate and time.monotonic() - since > retry.rate_window:
                if count < retry.min_rate * retry.rate_window:
                    raise TransientError(f"slower than {retry.min_rate:g} bytes/s (data.cache.min_rate)")
                since, count = time.monotonic(), 0
            try:
                item = items.get(timeout=_POLL)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, bytes):
                count += len(item)
            yield item
    finally:
        left.set()


def _receive(
    url: str,
    start: int,
    timeout: float,
    items: "queue.Queue[_Start | bytes | BaseException | None]",
    left: threading.Event,
) -> None:
    def put(item: _Start | bytes | BaseException | None) -> None:
        while not left.is_set():
            try:
                items.put(item, timeout=_POLL)
                return
            except queue.Full:
                continue

    try:
        with open_body(url, start, timeout) as body:
            put(_Start(body.start))
            for chunk in body.chunks:
                put(chunk)
                if left.is_set():
                    return
        put(None)
    except BaseException as error:
        put(error)
