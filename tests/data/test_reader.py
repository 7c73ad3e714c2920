import gzip
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from dist_pca.data.reader import ShardReader
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from tests.data.shards import index_shard, make_shards, sample_members, with_keys


def read(manifest: Manifest, shard: int, sample: int) -> dict[str, object]:
    reader = ShardReader(manifest, keep_open=1)
    try:
        return reader.read(shard, sample)
    finally:
        reader.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_sample_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [2, 3])
    assert read(manifest, 1, 2) == {
        "__key__": "001-002",
        "__url__": str(tmp_path / "shards/shard-000001.tar"),
        "__size__": (24, 40),
        **sample_members(1002),
    }


def test_only_the_last_few_shards_stay_open_and_none_after_closing(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [1] * 5)
    before = open_files()
    reader = ShardReader(manifest, keep_open=2)
    for shard in (0, 1, 2, 3, 4, 0, 4):
        assert reader.read(shard, 0)["__key__"] == f"{shard:03d}-000"
    assert open_files() == before + 2
    reader.close()
    assert open_files() == before


def test_a_truncated_shard_names_itself_and_the_key(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [3])
    shard = manifest.shards[0]
    os.truncate(tmp_path / "shards" / shard.name, shard.offsets[2] + 700)
    assert read(manifest, 0, 1)["__key__"] == "000-001"
    with pytest.raises(UserError, match=r"shard-000000\.tar: ends inside sample '000-002'; copy the shard again"):
        read(manifest, 0, 2)


def test_a_shard_that_is_no_tar_or_is_gone_names_itself_and_the_key(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [1, 1])
    first, second = (tmp_path / "shards" / shard.name for shard in manifest.shards)
    first.write_bytes(os.urandom(first.stat().st_size))
    second.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample '000-000' is unreadable"):
        read(manifest, 0, 0)
    with pytest.raises(UserError, match=r"shard-000001\.tar: sample '001-000' is unreadable .*No such file"):
        read(manifest, 1, 0)


def test_a_compressed_shard_is_refused_rather_than_inflated(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [1])
    path = tmp_path / "shards" / manifest.shards[0].name
    path.write_bytes(gzip.compress(path.read_bytes(), compresslevel=0))
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample '000-000' is unreadable"):
        read(manifest, 0, 0)


@pytest.mark.parametrize("key", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_key_that_leaves_its_folder_is_refused(tmp_path: Path, key: str) -> None:
    manifest = with_keys(make_shards(tmp_path / "shards", [1]), [key])
    with pytest.raises(UserError, match="the key leaves its folder"):
        read(manifest, 0, 0)


def test_links_devices_holes_and_other_keys_are_left_out(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [1])
    path = tmp_path / "shards" / manifest.shards[0].name
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, headers: dict[str, str] | None = None) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.pax_headers = kind, "/etc/passwd", headers or {}
            content = b"text" if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        add("000-000.txt")
        add("000-000.png", tarfile.SYMTYPE)
        add("000-000.jpg", tarfile.LNKTYPE)
        add("000-000.webp", tarfile.CHRTYPE)
        add("000-000.json", tarfile.DIRTYPE)
        add("000-000.jpeg", headers={"GNU.sparse.map": "0,4", "GNU.sparse.size": str(2**40)})
        add("../000-000.label.png")
        add("other.label.png")
    shard = index_shard(path, 8, True, 3, (24, 40))
    members = read(replace(manifest, shards=(shard,)), 0, 0)
    assert {name: value for name, value in members.items() if not name.startswith("__")} == {"txt": b"text"}
