import contextlib
import gzip
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.data.read import ShardReader
from dist_pca.errors import CorruptSample, UserError
from dist_pca.shards.manifest import Manifest, Shard
from tests.support.shards import CLASSES, index_shard, make_shards, sample_members, with_keys


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
        "__bands__": 3,
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
    with pytest.raises(CorruptSample, match=r"shard-000000\.tar: sample '000-000' is unreadable"):
        read(manifest, 0, 0)
    with pytest.raises(UserError, match=r"shard-000001\.tar: sample '001-000' is unreadable .*No such file") as caught:
        read(manifest, 1, 0)
    assert not isinstance(caught.value, CorruptSample)


def test_a_compressed_shard_is_refused_rather_than_inflated(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [1])
    path = tmp_path / "shards" / manifest.shards[0].name
    path.write_bytes(gzip.compress(path.read_bytes(), compresslevel=0))
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample '000-000' is unreadable"):
        read(manifest, 0, 0)


@pytest.mark.parametrize("key", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_key_that_leaves_its_folder_is_refused(tmp_path: Path, key: str) -> None:
    manifest = with_keys(make_shards(tmp_path / "shards", [1]), [key])
    with pytest.raises(UserError, match="the key is a path outside its folder"):
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


def test_a_sample_as_shards_are_built_here_needs_no_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"jpg": bytes(range(256)) * 5, "label.png": b"", "json": b"{}"}
    content = b"".join(plain_member(f"seq/000.{name}", value) for name, value in members.items())
    manifest = one_sample(tmp_path, "seq/000", content)
    monkeypatch.delattr(tarfile, "open")
    path = str(tmp_path / "shard-000000.tar")
    own = {"__key__": "seq/000", "__url__": path, "__size__": (24, 40), "__bands__": 3}
    assert read(manifest, 0, 0) == {**own, **members}


NAMES = st.one_of(
    st.sampled_from(
        ["k.jpg", "k.LABEL.png", "k.", "k", "../k.jpg", "k.a/", "other.jpg", "k." + 98 * "x", "k." + 99 * "x"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=150),
)
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1100), st.sampled_from(KINDS), st.sampled_from(FORMATS)), max_size=4),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=2),
    st.booleans(),
)
@settings(max_examples=300)
def test_whatever_the_tar_holds_is_read_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, bytes, bytes, int]],
    damage: list[tuple[int, int]],
    sealed: bool,
) -> None:
    buffer = bytearray()
    for name, content, kind, form in members:
        with contextlib.suppress(ValueError):
            buffer += plain_member(name, content, kind, form)
    tar = bytes(buffer)
    for place, value in damage:
        if place < len(tar):
            tar = altered(tar, place, bytes([value])) if sealed else tar[:place] + bytes([value]) + tar[place + 1 :]
    manifest = one_sample(tmp_path_factory.mktemp("shards"), "k", tar)
    expected = members_by_tarfile(tar, "k.")
    if expected is None:
        with pytest.raises(CorruptSample):
            read(manifest, 0, 0)
    else:
        assert {name: value for name, value in read(manifest, 0, 0).items() if name[:2] != "__"} == expected


@pytest.mark.parametrize("size", [b"77777777777\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + bytes(10) + b"\xff"])
def test_a_member_that_claims_more_than_there_is_or_less_than_nothing_is_corrupt(tmp_path: Path, size: bytes) -> None:
    header = altered(plain_member("k.jpg", b""), 124, size)
    with pytest.raises(CorruptSample, match=r"shard-000000\.tar: sample 'k' is unreadable"):
        read(one_sample(tmp_path, "k", header), 0, 0)


@pytest.mark.parametrize(("place", "text"), [(60, b"after the name's end"), (345, b"folder before the name")])
def test_a_name_is_what_tarfile_takes_it_for(tmp_path: Path, place: int, text: bytes) -> None:
    content = altered(plain_member("k.jpg", b"image"), place, text)
    sample = read(one_sample(tmp_path, "k", content), 0, 0)
    assert {name: value for name, value in sample.items() if name[:2] != "__"} == members_by_tarfile(content, "k.")


def test_a_header_that_lost_a_bit_is_corrupt(tmp_path: Path) -> None:
    content = plain_member("k.jpg", b"").replace(b"k.jpg", b"k.jpf")
    with pytest.raises(CorruptSample, match=r"shard-000000\.tar: sample 'k' is unreadable"):
        read(one_sample(tmp_path, "k", content), 0, 0)


def test_the_member_at_which_a_tar_breaks_is_named(tmp_path: Path) -> None:
    long = altered(plain_member("k.png", b"image"), 124, b"00000777777\0")
    with pytest.raises(CorruptSample, match=r"sample 'k' is unreadable \(member 'k\.png': extends beyond the sample\)"):
        read(one_sample(tmp_path, "k", plain_member("k.label.png", b"label") + long), 0, 0)


def altered(content: bytes, place: int, text: bytes) -> bytes:
    """With other bytes in a header, whose checksum is right however hostile the rest."""
    start = place // 512 * 512
    changed = bytearray(content[:place] + text + content[place + len(text) :])
    changed[start + 148 : start + 156] = b" " * 8
    changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return bytes(changed)


def plain_member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, form: Any = tarfile.USTAR_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    return info.tobuf(form) + content + bytes(-len(content) % 512)


def one_sample(folder: Path, key: str, content: bytes) -> Manifest:
    (folder / "shard-000000.tar").write_bytes(content)
    shard = Shard("shard-000000.tar", len(content), "", [key], [0], [len(content)], [24], [40], [])
    return Manifest(folder, "test", 1, "all", False, CLASSES, (shard,))


def members_by_tarfile(content: bytes, prefix: str) -> dict[str, bytes] | None:
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content + bytes(1024)), mode="r:") as archive:
            for member in archive:
                if member.size < 0:
                    return None
                if member.isreg() and not member.issparse() and member.offset_data + member.size > len(content):
                    return None
                if member.isreg() and not member.issparse() and member.name.startswith(prefix):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    members[member.name.removeprefix(prefix).lower()] = stream.read()
    except (tarfile.TarError, ValueError, OverflowError, OSError):
        return None
    return members
