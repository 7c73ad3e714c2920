from dataclasses import replace
from pathlib import Path

import pytest

from dist_pca.data.cache import CacheSettings, open_manifest
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest, save_manifest
from tests.data.copies import content_of, original
from tests.data.servers import FolderServer
from tests.support.shards import make_shards


def test_a_local_folder_s_manifest_is_read_where_it_is(local: Manifest, cache: CacheSettings) -> None:
    assert open_manifest(str(local.folder), cache) == local
    assert not cache.folder.exists()


def test_a_url_s_manifest_says_the_same_from_a_folder_of_the_cache(
    local: Manifest, location: str, cache: CacheSettings
) -> None:
    manifest = open_manifest(location, cache)
    assert manifest.location == location
    assert manifest.folder.parent == cache.folder
    assert replace(manifest, folder=local.folder) == local


def test_a_pipe_is_not_opened(cache: CacheSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\Ashards pipe: unknown URL scheme; [^\n]+\Z"):
        open_manifest(f"pipe:touch {tmp_path / 'executed'}", cache)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"format": "dist-pca-shards", "version": 99}', "but this dist-pca reads versions up to 2"),
        (b"<html>Please log in</html>", "not JSON"),
    ],
)
def test_another_manifest_than_ours_is_refused_in_one_line_with_its_url(
    local: Manifest, location: str, cache: CacheSettings, content: bytes, complaint: str
) -> None:
    (local.folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"\A{location}: [^\n]*{complaint}[^\n]*\Z"):
        open_manifest(location, cache)


@pytest.mark.parametrize("name", ["..", ".shard-000000.tar.part", "manifest.json"])
def test_a_shard_may_not_take_the_name_of_anything_else(
    local: Manifest, location: str, cache: CacheSettings, name: str
) -> None:
    save_manifest(replace(local, shards=(replace(local.shards[0], name=name),)))
    with pytest.raises(UserError, match=rf"\A{location}: [^\n]+\Z"):
        open_manifest(location, cache)


LIST = "shard-{000001..000002}.tar"


def test_a_list_of_shards_is_a_part_of_the_folder_local_or_remote(
    local: Manifest, location: str, cache: CacheSettings, server: FolderServer
) -> None:
    for where, folder in ((f"{location}/{LIST}", location), (f"{local.folder}/{LIST}", str(local.folder))):
        manifest = open_manifest(where, cache)
        assert [shard.name for shard in manifest.shards] == ["shard-000001.tar", "shard-000002.tar"]
        assert manifest.samples == 8
        # With the location another process opens the same shards.
        assert open_manifest(manifest.location, cache).shards == manifest.shards
        assert open_manifest(folder, cache).samples == 16
    remote = open_manifest(f"{location}/{LIST}", cache)
    assert content_of(remote, 1, cache) == original(local, 2)
    assert server.asked("shard-000000.tar") == 0


@pytest.mark.parametrize("remote", [True, False])
def test_listed_shards_that_the_folder_lacks_are_refused(
    local: Manifest, location: str, cache: CacheSettings, remote: bool
) -> None:
    folder = location if remote else str(local.folder)
    message = r"\Ashards [^\n]*/shards: 2 of 5 listed shards are not in manifest\.json, the first is shard-000004\.tar;"
    with pytest.raises(UserError, match=message):
        open_manifest(f"{folder}/shard-{{000001..000005}}.tar", cache)


def test_a_folder_that_is_called_like_a_shard_is_a_folder(tmp_path: Path, cache: CacheSettings) -> None:
    assert make_shards(tmp_path / "{a,b}.tar", [2]).samples == 2
    assert open_manifest(str(tmp_path / "{a,b}.tar"), cache).samples == 2
