import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest

from dist_pca.config import CacheConfig
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.collate import Batch
from dist_pca.data.stream import evaluation_stream, stream
from dist_pca.shards.manifest import Manifest
from tests.data.servers import serving, serving_process
from tests.support.shards import CLASSES, data_config, make_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def take(
    manifest: Manifest, cache: Mapping[str, object], count: int, first: threading.Event | None = None
) -> list[Batch]:
    config = data_config(workers=2, shuffle_window=1, cache=cache)
    batches = stream(
        config, [manifest], "source", seed=0, rank=0, world_size=1, global_batch=3, accumulation=1, start_step=0
    )
    with closing(batches):
        taken = [next(batches)]
        if first is not None:
            first.set()
        return taken + list(islice(batches, count - 1))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return [batch.keys for batch in one] == [batch.keys for batch in other] and all(
        bool((mine.images == yours.images).all()) for mine, yours in zip(one, other, strict=True)
    )


def test_a_stream_over_http_is_that_of_the_folder(tmp_path: Path) -> None:
    local = make_shards(tmp_path / "served" / "shards", [3] * 6)
    cache = {"folder": str(tmp_path / "cache")}
    with serving(tmp_path / "served") as server:
        remote = open_manifest(
            f"http://127.0.0.1:{server.server_port}/shards", cache_settings(CacheConfig.model_validate(cache))
        )
        assert same(take(remote, cache, 6), take(local, {}, 6))
        # Every shard was wanted by two loader processes.
        assert [server.asked(shard.name) for shard in local.shards] == [1] * 6
        keys = [
            s.key
            for s in evaluation_stream(
                remote, 0, 1, classes=CLASSES, workers=0, cache=CacheConfig.model_validate(cache)
            )
        ]
        assert keys == [key for shard in local.shards for key in shard.keys]


@contextmanager
def http(local: Manifest, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with serving_process(local.folder.parent, port) as (server, port):
        yield server, f"http://127.0.0.1:{port}/{local.folder.name}"


@contextmanager
def s3(local: Manifest, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            client = boto3.client("s3", config=botocore.config.Config(retries={"max_attempts": 20, "mode": "standard"}))
            client.create_bucket(Bucket="bucket")
            for path in local.folder.iterdir():
                client.upload_file(str(path), "bucket", f"shards/{path.name}")
            yield server, "s3://bucket/shards"
        finally:
            server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("serve", [http, s3])
def test_an_epoch_with_the_server_killed_and_restarted_in_between_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Any]
) -> None:
    local = make_shards(tmp_path / "served" / "shards", [3] * 8)
    # So small a cache that shards are fetched all the time.
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": 3 * local.shards[0].bytes, "retries": 12, "timeout": 5}
    port = free_port()
    for name, value in {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "any")
    with serve(local, port) as (server, location):
        manifest = open_manifest(location, cache_settings(CacheConfig.model_validate(cache)))
        found: list[list[Batch]] = []
        first = threading.Event()
        reading = threading.Thread(target=lambda: found.append(take(manifest, cache, 32, first)))
        reading.start()
        first.wait()
        server.kill()
        server.wait()
    time.sleep(1)
    assert reading.is_alive()
    # All files are there from the first request on, as a bucket's are when its service is back.
    (tmp_path / "served" / "bucket").symlink_to(".")
    with serving_process(tmp_path / "served", port):
        reading.join(timeout=60)
    assert same(found[0], take(local, {}, 32))
