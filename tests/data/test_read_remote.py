"""Shards that are read over a network, and those that are fetched ahead of their reading."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from dist_pca.data.cache import CacheSettings, open_manifest
from dist_pca.data.read import ShardReader
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from tests.data.servers import FolderServer, serving_process
from tests.support.shards import make_shards


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return make_shards(tmp_path / "served/shards", [3] * 6)


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(timeout=0.5, retries=8, backoff=0.05, folder=tmp_path / "cache")


@pytest.fixture
def remote(server: FolderServer, cache: CacheSettings) -> Manifest:
    return open_manifest(f"http://127.0.0.1:{server.server_port}/shards", cache)


def places(manifest: Manifest) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, content in enumerate(manifest.shards) for sample in range(len(content.keys))]


def without_path(sample: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in sample.items() if name != "__url__"}


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def test_samples_of_a_url_are_those_of_the_folder_and_lie_in_the_cache(
    local: Manifest, remote: Manifest, cache: CacheSettings
) -> None:
    with closing(ShardReader(local, 1)) as here, closing(ShardReader(remote, 1, cache)) as there:
        for place in places(local):
            sample = there.read(*place)
            assert without_path(sample) == without_path(here.read(*place))
            assert sample["__url__"] == str(remote.folder / local.shards[place[0]].name)


def test_samples_of_a_bucket_are_those_of_the_folder(
    local: Manifest, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    bucket.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*bucket.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for path in local.folder.iterdir():
        client.upload_file(str(path), "bucket", f"deep/shards/{path.name}")
    manifest = open_manifest("s3://bucket/deep/shards/", cache)
    with closing(ShardReader(local, 1)) as here, closing(ShardReader(manifest, 1, cache)) as there:
        for place in places(local):
            assert without_path(there.read(*place)) == without_path(here.read(*place))
    bucket.stop()


def test_processes_reading_while_the_server_is_killed_and_restarted_lose_and_repeat_nothing(
    local: Manifest, tmp_path: Path, cache: CacheSettings
) -> None:
    with closing(ShardReader(local, 1)) as reader:
        expected = sorted(
            (str(sample["__key__"]), sample["png"]) for sample in (reader.read(*p) for p in places(local))
        )
    fork = multiprocessing.get_context("fork")
    samples, server_is_dead = fork.SimpleQueue(), fork.Event()

    def read_share(manifest: Manifest, worker: int) -> None:
        with closing(ShardReader(manifest, 1, cache)) as reader:
            for number, place in enumerate(places(local)[worker::3]):
                if number == 1:
                    server_is_dead.wait()
                sample = reader.read(*place)
                samples.put((sample["__key__"], sample["png"]))

    with serving_process(tmp_path / "served") as (server, port):
        manifest = open_manifest(f"http://127.0.0.1:{port}/shards", cache)
        readers = [fork.Process(target=read_share, args=(manifest, worker)) for worker in range(3)]
        for process in readers:
            process.start()
        found = [samples.get() for _ in readers]
        server.kill()
        server.wait()
    server_is_dead.set()
    time.sleep(0.3)
    with serving_process(tmp_path / "served", port):
        found += [samples.get() for _ in expected[3:]]
    for process in readers:
        process.join()
    assert sorted(found) == expected


def test_a_shard_fetched_ahead_is_not_fetched_when_it_is_read(
    remote: Manifest, server: FolderServer, cache: CacheSettings
) -> None:
    with closing(ShardReader(remote, 1, cache)) as reader:
        reader.prefetch([4, 2])
        assert eventually(lambda: (remote.folder / "shard-000002.tar").exists())
        assert [name for name, _ in server.requests[1:]] == ["shard-000004.tar", "shard-000002.tar"]
        reader.read(2, 0)
        reader.read(4, 1)
    assert len(server.requests) == 3


def test_reading_waits_for_a_fetch_ahead_rather_than_doing_it_too(
    remote: Manifest, server: FolderServer, cache: CacheSettings
) -> None:
    server.faults["shard-000004.tar"].append("stall")
    with closing(ShardReader(remote, 1, cache)) as reader:
        reader.prefetch([4])
        assert server.stalled.wait(5)
        assert reader.read(4, 0)["__key__"] == "004-000"
    assert server.asked("shard-000004.tar") == 2


def test_only_a_few_of_many_shards_are_fetched_ahead_and_the_newest_wish_counts(
    remote: Manifest, server: FolderServer, cache: CacheSettings
) -> None:
    server.faults["shard-000000.tar"].append("stall")
    with closing(ShardReader(remote, 1, cache)) as reader:
        reader.prefetch([0, 1])
        assert server.stalled.wait(5)
        reader.prefetch([2, 3, 4, 5, 1])
        assert eventually(lambda: (remote.folder / "shard-000005.tar").exists())
        time.sleep(0.1)
    assert server.asked("shard-000001.tar") == 0


def test_a_fault_of_a_fetch_ahead_is_told_by_the_reading_and_stops_no_other(
    remote: Manifest, server: FolderServer, cache: CacheSettings
) -> None:
    server.faults["shard-000000.tar"].extend(["404", "404"])
    with closing(ShardReader(remote, 1, cache)) as reader:
        reader.prefetch([0, 1])
        assert eventually(lambda: (remote.folder / "shard-000001.tar").exists())
        with pytest.raises(UserError, match=r"shard-000000\.tar: HTTP 404"):
            reader.read(0, 0)
        assert reader.read(0, 0)["__key__"] == "000-000"


def test_closing_ends_a_fetch_ahead_and_leaves_nothing_of_it(
    remote: Manifest, server: FolderServer, cache: CacheSettings
) -> None:
    threads = threading.active_count()
    server.faults["shard-000000.tar"].extend(["503"] * 9)
    reader = ShardReader(remote, 1, replace(cache, backoff=60))
    reader.prefetch([0])
    assert eventually(lambda: server.asked("shard-000000.tar") == 1)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 0.9
    assert eventually(lambda: threading.active_count() <= threads)
    assert [path.name for path in remote.folder.iterdir()] == ["manifest.json"]
    assert reader.read(1, 0)["__key__"] == "001-000"
    reader.close()


def test_shards_of_a_local_folder_need_no_fetching_ahead(local: Manifest) -> None:
    threads = threading.active_count()
    with closing(ShardReader(local, 1)) as reader:
        reader.prefetch([0, 1])
        assert threading.active_count() == threads
