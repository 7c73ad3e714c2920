"""Shards on a server, a cache for them, and settings of S3 clients."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_pca.data import bodies
from dist_pca.data.cache import CacheSettings
from dist_pca.shards.manifest import Manifest
from tests.data.servers import FolderServer, serving
from tests.support.shards import make_shards


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "access",
        "AWS_SECRET_ACCESS_KEY": "sesame",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    bodies._s3_client.cache_clear()


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return make_shards(tmp_path / "served/shards", [4, 4, 4, 4])


@pytest.fixture
def server(tmp_path: Path, local: Manifest) -> Iterator[FolderServer]:
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture
def location(server: FolderServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/shards"


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(timeout=20, retries=2, backoff=0.1, folder=tmp_path / "cache")
