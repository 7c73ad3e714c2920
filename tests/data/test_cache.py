import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from dist_pca.data.cache import CacheSettings, default_folder, open_manifest, open_shard
from dist_pca.data.read import ShardReader
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest, load_manifest, save_manifest
from dist_pca.shards.sample import read_sample
from tests.data.copies import content_of, original
from tests.data.servers import FolderServer
from tests.support.shards import sample_members, write_shards

# Loader workers are forked too, from a process that may have connections open.
FORK = multiprocessing.get_context("fork")


def kept(cache: CacheSettings) -> list[str]:
    return sorted(path.name for path in cache.folder.glob("*/*") if path.name != "manifest.json")


def start(function: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def test_the_cache_is_in_the_home_folder_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DIST_PCA_CACHE", raising=False)
    assert default_folder() == tmp_path / ".cache/dist_pca/shards"
    monkeypatch.setenv("DIST_PCA_CACHE", "~/scratch")
    assert CacheSettings().folder == tmp_path / "scratch"


def test_a_shard_is_fetched_once_and_is_the_original(
    local: Manifest, server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    for _ in range(3):
        assert content_of(manifest, 1, cache) == original(local, 1)
    assert server.asked("shard-000001.tar") == 1
    assert kept(cache) == ["shard-000001.tar"]


def test_a_truncated_copy_is_fetched_again(
    local: Manifest, server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    content_of(manifest, 0, cache)
    os.truncate(manifest.folder / manifest.shards[0].name, 1000)
    assert content_of(manifest, 0, cache) == original(local, 0)
    assert server.asked("shard-000000.tar") == 2


def test_another_version_of_the_folder_does_not_take_the_copies_of_the_first(
    local: Manifest, location: str, cache: CacheSettings
) -> None:
    assert content_of(open_manifest(location, cache), 0, cache) == original(local, 0)
    path = local.folder / local.shards[0].name
    path.write_bytes(original(local, 1))
    changed = replace(local.shards[1], name=local.shards[0].name)
    assert changed.bytes == local.shards[0].bytes
    save_manifest(replace(local, shards=(changed, *local.shards[1:])))
    assert content_of(open_manifest(location, cache), 0, cache) == original(local, 1)


def test_processes_that_want_the_same_shard_fetch_it_once(
    local: Manifest, server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    server.faults["shard-000000.tar"].append("503")  # keeps the first one busy while the others come
    barrier, contents = FORK.Barrier(4), FORK.SimpleQueue()

    def fetch() -> None:
        barrier.wait()
        contents.put(content_of(manifest, 0, cache))

    processes = [start(fetch) for _ in range(4)]
    assert [contents.get() for _ in processes] == [original(local, 0)] * 4
    for process in processes:
        process.join()
    assert server.asked("shard-000000.tar") == 2


def test_a_fetch_killed_half_way_leaves_nothing_that_counts_as_a_shard_and_is_cleaned_up(
    local: Manifest, server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    server.faults["shard-000000.tar"].append("stall")
    process = start(open_shard, manifest, 0, replace(cache, timeout=30))
    assert server.stalled.wait(10)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert kept(cache) == [".shard-000000.tar.part"]
    assert content_of(manifest, 1, cache) == original(local, 1)
    assert kept(cache) == ["shard-000001.tar"]
    assert content_of(manifest, 0, cache) == original(local, 0)
    assert kept(cache) == ["shard-000000.tar", "shard-000001.tar"]


def test_whoever_waits_for_a_fetch_that_is_killed_takes_it_over(
    local: Manifest, server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    server.faults["shard-000000.tar"].append("stall")
    process = start(open_shard, manifest, 0, replace(cache, timeout=30))
    assert server.stalled.wait(10)
    contents: list[bytes] = []
    waiting = threading.Thread(target=lambda: contents.append(content_of(manifest, 0, cache)))
    waiting.start()
    time.sleep(0.2)
    assert not contents
    process.kill()
    waiting.join(timeout=5)
    process.join()
    assert contents == [original(local, 0)]


def test_the_least_recently_used_shards_make_room_and_open_ones_read_on(
    local: Manifest, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    size = manifest.shards[0].bytes
    room = (manifest.folder / "manifest.json").stat().st_size
    small = replace(cache, max_bytes=3 * size + room + size // 2)
    first = open_shard(manifest, 0, small)
    for index in (1, 2, 1):
        time.sleep(0.02)  # the kernel's clock for files ticks every few milliseconds
        content_of(manifest, index, small)
    os.utime(manifest.folder / "manifest.json")
    content_of(manifest, 3, small)
    assert kept(cache) == ["shard-000001.tar", "shard-000002.tar", "shard-000003.tar"]
    assert os.pread(first, size, 0) == original(local, 0)
    os.close(first)
    time.sleep(0.02)
    assert content_of(manifest, 0, small) == original(local, 0)
    assert kept(cache) == ["shard-000000.tar", "shard-000001.tar", "shard-000003.tar"]


def test_many_readers_in_a_cache_of_two_shards_stay_within_it_and_read_what_was_written(
    local: Manifest, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    limit = manifest.shards[0].bytes * 2
    expected = [original(local, index) for index in range(4)]
    results = FORK.SimpleQueue()

    def read_all(offset: int) -> None:
        indices = [(offset + step) % 4 for step in range(12)]
        results.put(all(content_of(manifest, i, replace(cache, max_bytes=limit)) == expected[i] for i in indices))

    processes = [start(read_all, offset) for offset in range(4)]
    most = 0
    with (cache.folder / ".lock").open("a") as lock:
        while any(process.is_alive() for process in processes):
            # Copies come and go under the cache's lock only; without it one is counted beside its successor.
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                most = max(most, sum(path.stat().st_size for path in manifest.folder.glob("*.tar*")))
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(0.001)
    assert [results.get() for _ in processes] == [True] * 4
    assert 0 < most <= limit


def test_a_fetched_shard_gets_its_name_only_while_nobody_is_making_room(
    local: Manifest, server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    server.faults["shard-000000.tar"].append("stall")
    process = start(open_shard, manifest, 0, cache)
    assert server.stalled.wait(10)
    with (cache.folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server.go_on.set()
        while (manifest.folder / ".shard-000000.tar.part").read_bytes() != original(local, 0):
            time.sleep(0.01)
        time.sleep(0.2)
        assert kept(cache) == [".shard-000000.tar.part"]
    process.join()
    assert kept(cache) == ["shard-000000.tar"]


def test_files_that_are_not_the_cache_s_are_never_removed(location: str, cache: CacheSettings) -> None:
    own = [cache.folder / "photos/holiday.tar", cache.folder / "notes.txt", cache.folder / "photos/.a.part"]
    own[0].parent.mkdir(parents=True)
    for path in own:
        path.write_bytes(bytes(1000))
    manifest = open_manifest(location, cache)
    small = replace(cache, max_bytes=manifest.shards[0].bytes)
    for index in range(4):
        content_of(manifest, index, small)
    assert kept(cache) == [".a.part", "holiday.tar", "shard-000003.tar"]
    assert all(path.read_bytes() == bytes(1000) for path in own)


def test_a_shard_larger_than_the_cache_is_one_line_and_not_fetched(
    server: FolderServer, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    with pytest.raises(UserError, match=r"\A[^\n]+shard-000000\.tar: \d+ bytes, but the cache is limited to 1000; "):
        open_shard(manifest, 0, replace(cache, max_bytes=1000))
    assert server.asked("shard-000000.tar") == 0


def test_a_disk_that_takes_no_more_is_one_line_and_nothing_half_written_is_left(
    location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    messages = FORK.SimpleQueue()

    def fetch() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            open_shard(manifest, 0, cache)
        except UserError as error:
            messages.put(str(error))

    process = start(fetch)
    process.join()
    assert process.exitcode == 0
    message = messages.get()
    assert "shard-000000.tar: cannot be written to the cache (File too large); free space" in message
    assert "\n" not in message
    assert kept(cache) == []


def test_a_cache_where_no_folder_can_be_made_is_one_line(location: str, cache: CacheSettings) -> None:
    cache.folder.write_text("a file")
    with pytest.raises(UserError, match=r"\A[^\n]+cannot be written to the cache \([^\n]+\); [^\n]+DIST_PCA_CACHE\Z"):
        open_manifest(location, cache)


@pytest.mark.parametrize("change", ["other bytes", "shorter", "longer"])
def test_a_shard_changed_since_its_manifest_is_final_and_not_kept(
    local: Manifest, location: str, cache: CacheSettings, change: str
) -> None:
    manifest = open_manifest(location, cache)
    content = original(local, 0)
    (local.folder / local.shards[0].name).write_bytes(
        {"other bytes": bytes(len(content)), "shorter": content[:-512], "longer": content + bytes(512)}[change]
    )
    with pytest.raises(UserError, match=r"\Ahttp://[^\n]+/shard-000000\.tar: [^\n]+ changed[^\n]+\Z"):
        open_shard(manifest, 0, cache)
    assert kept(cache) == []


def test_a_shard_put_right_in_the_middle_of_its_transfer_is_taken_afresh(
    server: FolderServer, location: str, cache: CacheSettings
) -> None:
    members = sample_members(0, height=200, width=300)
    large = write_shards(server.folder / "large", [[members]], size=(200, 300))
    manifest = open_manifest(location.replace("shards", "large"), cache)
    content = original(large, 0)
    path = large.folder / large.shards[0].name
    path.write_bytes(bytes(len(content)))
    server.faults[path.name].append("stall")

    def put_right() -> None:
        server.stalled.wait()
        path.write_bytes(content)
        server.go_on.set()

    fixer = threading.Thread(target=put_right)
    fixer.start()
    assert content_of(manifest, 0, replace(cache, timeout=5)) == content
    fixer.join()
    assert [asked is None for name, asked in server.requests if name == path.name] == [True, False, True]


def test_a_cache_that_someone_else_filled_is_read_without_making_a_file(
    local: Manifest, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    content_of(manifest, 0, cache)
    before = sorted((path, path.stat().st_ino) for path in cache.folder.rglob("*"))
    assert content_of(open_manifest(location, cache), 0, cache) == original(local, 0)
    assert sorted((path, path.stat().st_ino) for path in cache.folder.rglob("*")) == before
    assert load_manifest(local.folder) == local


class Store(LocalFileSystem):  # type: ignore[misc]
    """An object store of fsspec's: the folder `root`."""

    root = Path()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(cls.root / path.removeprefix("gcs://"))


def test_shards_are_read_by_fsspec(tmp_path: Path, local: Manifest, cache: CacheSettings) -> None:
    Store.root = tmp_path / "served"
    fsspec.register_implementation("gcs", Store, clobber=True)
    manifest = open_manifest("gcs://shards", cache)
    with closing(ShardReader(manifest, 1, cache)) as reader:
        assert reader.read(3, 1)["png"] == read_sample(local, local.shards[3], 1)["png"]
    assert kept(cache) == ["shard-000003.tar"]
