"""The node's cache of remote shards: downloaded once for all its processes, atomically, within a size limit."""

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from dist_pca.config import CacheConfig
from dist_pca.data.addresses import is_remote, object_url, redact, split_shards
from dist_pca.data.remote import Cancelled, RetryPolicy, download
from dist_pca.errors import UserError
from dist_pca.files import PART, file_sha256, sync
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest

_CACHE_FOLDER = re.compile(r".*-[0-9a-f]{16}")
_MAX_MANIFEST = 1 << 30
_AHEAD = 4


def default_folder() -> Path:
    """Default folder of the cache: $DIST_PCA_CACHE, or a folder in the user's home."""
    return Path(os.environ.get("DIST_PCA_CACHE") or "~/.cache/dist_pca/shards").expanduser()


@dataclass(frozen=True)
class CacheSettings(RetryPolicy):
    """Folder and size limit of the cache, and the retry policy of downloads."""

    folder: Path = field(default_factory=default_folder)
    """Folder on a local disk; shared by all processes of the node."""
    max_bytes: int = 50 * 10**9
    """Limit on the size of all files. A file that is evicted while it is being read uses its space until it is
    closed."""


def cache_settings(config: CacheConfig) -> CacheSettings:
    """Cache settings of a run's config."""
    folder = default_folder() if config.folder is None else Path(config.folder).expanduser()
    return CacheSettings(
        config.timeout, config.retries, min_rate=config.min_rate, folder=folder, max_bytes=config.max_bytes
    )


def open_manifest(location: str, cache: CacheSettings) -> Manifest:
    """Read the manifest of a local or remote shard folder.

    Args:
        location: A local folder, or the URL of one, whose manifest is then downloaded every time. If it ends in the
            names of shards, as in `shard-{000000..000009}.tar`, only these are used.
        cache: Cache for the files of a URL.

    Raises:
        UserError: the location is of another kind or cannot be reached, the manifest is missing or invalid, or it does
            not have the shards.
    """
    remote = is_remote(location)
    folder, names = (location, None) if not remote and Path(location).is_dir() else split_shards(location)
    manifest = _download_manifest(folder, cache) if remote else load_manifest(folder)
    if names is None:
        return manifest
    there, wanted = {shard.name for shard in manifest.shards}, set(names)
    missing = [name for name in names if name not in there]
    if missing:
        raise UserError(
            f"shards {redact(folder)}: {len(missing):,} of {len(names):,} listed shards are not in {MANIFEST_NAME}, "
            f"the first is {missing[0]}; correct the list, or index the folder again"
        )
    return replace(
        manifest, shards=tuple(shard for shard in manifest.shards if shard.name in wanted), location=location
    )


def _download_manifest(location: str, cache: CacheSettings) -> Manifest:
    buffer = io.BytesIO()
    download(object_url(location, MANIFEST_NAME), buffer, most=_MAX_MANIFEST, retry=cache)
    content = buffer.getvalue()
    # Another version of the folder may have shards of the same names and sizes, so each version has its own folder.
    version = hashlib.sha256(redact(location).encode() + b"\0" + content).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", redact(location).partition("://")[2]).strip("-.")
    path = cache.folder / f"{name[:100]}-{version}" / MANIFEST_NAME
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            with _locked_part(path) as part:
                part.write(content)
                _publish(part, path)
    try:
        manifest = load_manifest(path.parent, location=location, check_files=False)
    except UserError as error:
        raise UserError(f"{redact(location)}: {error}") from None
    for shard in manifest.shards:
        if shard.name.startswith(".") or shard.name == MANIFEST_NAME:
            raise UserError(
                f"{redact(location)}: {MANIFEST_NAME}: {shard.name!r} is not a valid shard name; build the shards again"
            )
    return manifest


def open_shard(
    manifest: Manifest, shard_index: int, cache: CacheSettings, *, cancelled: threading.Event | None = None
) -> int:
    """Open a remote shard's copy, and return a file descriptor; download it if it is missing or has a wrong size.

    The copy may be evicted from the cache later; the descriptor stays valid.

    Args:
        manifest: Result of `open_manifest` for a URL.
        shard_index: Index of the shard.
        cache: Cache limit and retry policy.
        cancelled: Stops a download once it is set.

    Raises:
        UserError: the shard cannot be downloaded, differs from the manifest, is larger than the cache, or cannot be
            written to disk.
        Cancelled: `cancelled` was set.
    """
    cancelled = cancelled or threading.Event()
    shard = manifest.shards[shard_index]
    path = manifest.folder / shard.name
    if shard.bytes > cache.max_bytes:
        raise UserError(
            f"{redact(object_url(manifest.location, shard.name))}: {shard.bytes} bytes, but the cache is limited to "
            f"{cache.max_bytes}; raise data.cache.max_bytes or build smaller shards"
        )
    with _disk_errors(path):
        descriptor = _open_whole(path, shard.bytes)
        if descriptor is not None:
            return descriptor
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_part(path) as part:
            descriptor = _open_whole(path, shard.bytes)
            if descriptor is not None:
                return descriptor
            while not _reserve(part, shard.bytes, path.parent.parent, cache.max_bytes):
                if cancelled.wait(0.05):
                    raise Cancelled
            _fetch(manifest, shard, part, cache, cancelled)
            # Open it before it is renamed: afterwards another process may evict it at any time.
            descriptor = os.open(_temporary_path(path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                _publish(part, path)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor


class Prefetcher:
    """Downloads remote shards before they are read, in a daemon thread; errors are ignored and recur when reading."""

    def __init__(self, manifest: Manifest, cache: CacheSettings) -> None:
        """Start the thread.

        Args:
            manifest: Result of `open_manifest` for a URL.
            cache: Cache limit and retry policy.
        """
        self._manifest = manifest
        self._cache = cache
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def want(self, shard_indices: Sequence[int]) -> None:
        """Download the first few of these shards, in this order; replaces an earlier call's list."""
        with self._changed:
            self._wanted = deque(shard_indices[:_AHEAD])
            self._changed.notify()

    def close(self) -> None:
        """End the thread; a running download is cancelled."""
        self._cancelled.set()
        with self._changed:
            self._changed.notify()
        # The thread may wait for a server that does not respond; a daemon thread does not delay the exit.
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
    # Try twice: if the file changed on the server during a resumed transfer, the first copy has bytes of both versions.
    for _ in range(2):
        download(url, part, most=shard.bytes, retry=cache, cancelled=cancelled)
        if file_sha256(_temporary_path(manifest.folder / shard.name)) == shard.sha256:
            return
    raise UserError(
        f"{redact(url)}: {part.tell()} bytes that are not the {shard.bytes} of {MANIFEST_NAME} (SHA-256 differs); "
        "the shards were changed: restart the run if their manifest was changed too, otherwise upload the folder again"
    )


def _open_whole(path: Path, size: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        return None
    # The modification time serves as the time of last use; it cannot be set on another user's file.
    with contextlib.suppress(OSError):
        os.utime(descriptor)
    return descriptor


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{PART}")


@contextmanager
def _locked_part(path: Path) -> Iterator[IO[bytes]]:
    """Create and lock an empty temporary file for `path`; it is removed on exit unless it was published.

    The lock is on the temporary file itself, so it ends with the process; an unlocked temporary file is stale.
    """
    temporary = _temporary_path(path)
    while True:
        part = os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        fcntl.flock(part, fcntl.LOCK_EX)
        if _is_at(part, temporary):
            break
        part.close()
    try:
        part.truncate(0)
        yield part
    finally:
        if _is_at(part, temporary):
            temporary.unlink()
        # As for the cache's lock below, closing the file may not release it.
        fcntl.flock(part, fcntl.LOCK_UN)
        part.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _publish(part: IO[bytes], path: Path) -> None:
    part.flush()
    temporary = _temporary_path(path)
    sync(temporary)
    # A process that makes room meanwhile would find the file under neither name, and not count it.
    with _locked_cache(path.parent.parent):
        temporary.replace(path)


@contextmanager
def _locked_cache(root: Path) -> Iterator[None]:
    """Lock the cache's list of files; take it for a moment only, as all processes of the node wait for it."""
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing the file does not release the lock if a process forked in the meantime has it open too.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _reserve(part: IO[bytes], size: int, root: Path, limit: int) -> bool:
    """Evict the least recently used files and give a temporary file its full size; False if there is no room."""
    with _locked_cache(root):
        files = []
        # The folder may contain files that are not the cache's; those must never be removed.
        for path in (path for path in root.glob("*/*") if _CACHE_FOLDER.fullmatch(path.parent.name)):
            if path.suffix != PART or not _removed_if_stale(path):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, path in sorted(files):
            if total > limit and path.suffix != PART:
                path.unlink(missing_ok=True)
                total -= bytes_
        if total <= limit:
            part.truncate(size)
        return total <= limit


def _removed_if_stale(part: Path) -> bool:
    """Remove a temporary file if it is stale, that is, left behind by a process that ended; return whether it was."""
    try:
        with part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, part):
                part.unlink()
            return True
    except (BlockingIOError, PermissionError):  # It is another process's, or another user's.
        return False
    except FileNotFoundError:
        return True


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written to the cache ({error.strerror}); free space there or set another folder in "
            "DIST_PCA_CACHE"
        ) from error
