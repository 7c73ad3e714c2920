"""A node's copies of remote shards: fetched once for all of its processes, whole or not there, within a limit."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dist_pca.config import CacheConfig
from dist_pca.data.storage import Cancelled, Patience, download, is_remote, object_url, shown
from dist_pca.errors import UserError
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, Shard, file_sha256, load_manifest

_OWN_FOLDER = re.compile(r".*-[0-9a-f]{16}")
_PART = ".part"
_MAX_MANIFEST = 1 << 30
_AHEAD = 4


def default_folder() -> Path:
    """$DIST_PCA_CACHE, or a folder in the user's home."""
    return Path(os.environ.get("DIST_PCA_CACHE") or "~/.cache/dist_pca/shards").expanduser()


@dataclass(frozen=True)
class CacheSettings(Patience):
    """Where copies of remote shards are kept, how many, and how they are fetched."""

    folder: Path = field(default_factory=default_folder)
    """On a local disk; shared by all processes of the node."""
    max_bytes: int = 50 * 10**9
    """All files together. One that is removed while a process reads it takes its space until that one closes it."""


def cache_settings(config: CacheConfig) -> CacheSettings:
    """The settings that a run's configuration gives."""
    folder = default_folder() if config.folder is None else Path(config.folder).expanduser()
    return CacheSettings(config.timeout, config.retries, folder=folder, max_bytes=config.max_bytes)


def open_manifest(location: str, cache: CacheSettings) -> Manifest:
    """The manifest of a shard folder, wherever that is.

    Args:
        location: A local folder, or an http(s) or s3 URL of one, whose manifest is then fetched every time.
        cache: Where files of a URL go, and how.

    Raises:
        UserError: the location is of another kind or cannot be reached, or the manifest is missing or not valid.
    """
    if not is_remote(location):
        return load_manifest(location)
    buffer = io.BytesIO()
    download(object_url(location, MANIFEST_NAME), buffer, most=_MAX_MANIFEST, patience=cache)
    content = buffer.getvalue()
    # Another version of the folder may have shards of the same names and sizes, so each has a place of its own.
    version = hashlib.sha256(shown(location).encode() + b"\0" + content).hexdigest()[:16]
    place = re.sub(r"[^A-Za-z0-9.]+", "-", shown(location).partition("://")[2]).strip("-.")
    path = cache.folder / f"{place[:100]}-{version}" / MANIFEST_NAME
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            with _claimed(path) as part:
                part.write(content)
                _publish(part, path)
    try:
        manifest = load_manifest(path.parent, location=location, check_files=False)
    except UserError as error:
        raise UserError(f"{shown(location)}: {error}") from None
    for shard in manifest.shards:
        if shard.name.startswith(".") or shard.name == MANIFEST_NAME:
            raise UserError(
                f"{shown(location)}: {MANIFEST_NAME}: {shard.name!r} is no name for a shard; build it again"
            )
    return manifest


def open_shard(
    manifest: Manifest, shard_index: int, cache: CacheSettings, *, cancelled: threading.Event | None = None
) -> int:
    """File descriptor of a remote shard's copy, which is fetched if it is missing or of a wrong size.

    The copy may be removed to make room for others; the descriptor reads on.

    Args:
        manifest: As `open_manifest` gives it for a URL.
        shard_index: Which shard.
        cache: Its limit, and how to fetch.
        cancelled: Ends a fetch once it is set.

    Raises:
        UserError: the shard cannot be fetched, has other bytes than the manifest says or more than the cache may hold,
            or the disk does not take it.
        Cancelled: `cancelled` was set.
    """
    cancelled = cancelled or threading.Event()
    shard = manifest.shards[shard_index]
    path = manifest.folder / shard.name
    if shard.bytes > cache.max_bytes:
        raise UserError(
            f"{shown(object_url(manifest.location, shard.name))}: {shard.bytes} bytes, the cache may hold "
            f"{cache.max_bytes}; raise its limit or build smaller shards"
        )
    with _disk(path):
        descriptor = _open_whole(path, shard.bytes)
        if descriptor is not None:
            return descriptor
        path.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(path) as part:
            descriptor = _open_whole(path, shard.bytes)
            if descriptor is not None:
                return descriptor
            while not _reserve(part, shard.bytes, path.parent.parent, cache.max_bytes):
                if cancelled.wait(0.05):
                    raise Cancelled
            _fetch(manifest, shard, part, cache, cancelled)
            # Once it has its name it may be removed before anybody opens it.
            descriptor = os.open(_aside(path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                _publish(part, path)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor


class Prefetcher:
    """Fetches remote shards before they are read, in a daemon thread of this process; faults are left to reading."""

    def __init__(self, manifest: Manifest, cache: CacheSettings) -> None:
        """Start the thread.

        Args:
            manifest: As `open_manifest` gives it for a URL.
            cache: Its limit, and how to fetch.
        """
        self._manifest = manifest
        self._cache = cache
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def want(self, shard_indices: Sequence[int]) -> None:
        """Fetch the first few of these, in this order, in place of those wanted before."""
        with self._changed:
            self._wanted = deque(shard_indices[:_AHEAD])
            self._changed.notify()

    def close(self) -> None:
        """End the thread; a fetch under way is dropped."""
        self._cancelled.set()
        with self._changed:
            self._changed.notify()
        # It may be waiting for a server that says nothing; as a daemon it keeps nobody.
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._cancelled.is_set())
                if self._cancelled.is_set():
                    return
                shard_index = self._wanted.popleft()
            with contextlib.suppress(UserError, Cancelled):
                os.close(open_shard(self._manifest, shard_index, self._cache, cancelled=self._cancelled))


def _fetch(manifest: Manifest, shard: Shard, part: IO[bytes], cache: CacheSettings, cancelled: threading.Event) -> None:
    url = object_url(manifest.location, shard.name)
    # Twice, because a transfer that went on in a file which had changed meanwhile has bytes of both.
    for _ in range(2):
        download(url, part, most=shard.bytes, patience=cache, cancelled=cancelled)
        if file_sha256(_aside(manifest.folder / shard.name)) == shard.sha256:
            return
    raise UserError(
        f"{shown(url)}: {part.tell()} bytes that are not the {shard.bytes} of {MANIFEST_NAME} (SHA-256 differs); "
        "the shards were changed: start again if their manifest was too, else upload the folder again"
    )


def _open_whole(path: Path, size: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        return None
    # The time of modification serves as that of last use; another user's copy refuses to have it set.
    with contextlib.suppress(OSError):
        os.utime(descriptor)
    return descriptor


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PART}")


@contextmanager
def _claimed(path: Path) -> Iterator[IO[bytes]]:
    """The part file of a file to be, empty and this caller's alone; it is gone afterwards unless it was published.

    The claim is a lock on the part file itself, so it ends with its process, and a part without a lock is nobody's.
    """
    aside = _aside(path)
    while True:
        part = os.fdopen(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        fcntl.flock(part, fcntl.LOCK_EX)
        if _has_name(part, aside):
            break
        part.close()
    try:
        part.truncate(0)
        yield part
    finally:
        if _has_name(part, aside):
            aside.unlink()
        # Closing is not enough: a process forked meanwhile has the file open too.
        fcntl.flock(part, fcntl.LOCK_UN)
        part.close()


def _has_name(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _publish(part: IO[bytes], path: Path) -> None:
    part.flush()
    os.fsync(part.fileno())
    _aside(path).replace(path)


def _reserve(part: IO[bytes], size: int, root: Path, limit: int) -> bool:
    """Let a part take its full size, once the least recently used files have made room; False if parts leave none."""
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = []
        # The folder may hold other things than ours, and removing those would be a disaster.
        for path in (path for path in root.glob("*/*") if _OWN_FOLDER.fullmatch(path.parent.name)):
            if path.suffix != _PART or not _removed_as_nobodys(path):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in files)
        for _, freed, path in sorted(files):
            if total > limit and path.suffix != _PART:
                path.unlink(missing_ok=True)
                total -= freed
        if total <= limit:
            part.truncate(size)
        return total <= limit


def _removed_as_nobodys(part: Path) -> bool:
    """Whether a part was left behind by a process that ended; it is then removed."""
    try:
        with part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _has_name(file, part):
                part.unlink()
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: the cache cannot take it ({error.strerror}); free space there or name another folder in "
            "DIST_PCA_CACHE"
        ) from error
