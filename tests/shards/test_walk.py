import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from dist_pca.errors import UserError
from dist_pca.shards.walk import walk
from tests.support.foreign_shards import write_tar

OWN = ("__key__", "__url__", "__local_path__")
NAMES = st.lists(
    st.text(st.sampled_from("aB._/é"), min_size=1, max_size=8).filter(
        lambda name: not name.startswith("/") and not name.endswith("/") and ".." not in name.split("/")
    )
    | st.text(st.sampled_from("ab/"), min_size=90, max_size=150).map(lambda name: f"x{name}.png"),
    max_size=12,
)


def _repeated(names: list[str]) -> bool:
    """Whether a member of a sample has the extension of an earlier one."""
    seen: set[str] = set()
    current = None
    for key, extension in map(base_plus_ext, names):
        if key is None or re.match("__[^/]*__($|/)", f"{key}.{extension}"):
            continue
        seen = seen if key == current else set()
        current = key
        if extension.lower() in seen:
            return True
        seen.add(extension.lower())
    return False


def _info(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(names=NAMES)
def test_samples_are_those_webdataset_reads_and_each_slice_is_a_tar_of_one(
    tmp_path_factory: pytest.TempPathFactory, form: int, names: list[str]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for number, name in enumerate(names):
            info = _info(name)
            info.size = 700 * (number % 3)
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
    reader = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    if _repeated(names):
        with pytest.raises(ValueError, match="duplicate file name"):
            list(reader)
        with pytest.raises(UserError, match="occurs twice in its sample"):
            walk(path)
        return
    expected = list(reader)
    places = walk(path)
    assert [place.key for place in places] == [members["__key__"] for members in expected]
    content = path.read_bytes()
    for place, members in zip(places, expected, strict=True):
        inside = {extension: content[start : start + size] for extension, (start, size) in place.members.items()}
        assert inside == {name: value for name, value in members.items() if name not in OWN}
        part = content[place.offset : place.offset + place.length]
        with tarfile.open(fileobj=io.BytesIO(part + bytes(1024)), mode="r:") as archive:
            found = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
        for extension, value in inside.items():
            assert {name.lower(): data for name, data in found.items()}[f"{place.key}.{extension}".lower()] == value


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.png", tarfile.SYMTYPE, "member 'a.png': not a regular file"),
        ("a.png", tarfile.LNKTYPE, "not a regular file"),
        ("a.fifo", tarfile.FIFOTYPE, "not a regular file"),
        ("/etc/a.png", tarfile.REGTYPE, "member '/etc/a.png': the name is outside its folder"),
        ("b/../../a.png", tarfile.REGTYPE, "the name is outside its folder"),
    ],
)
def test_members_that_are_more_than_a_file_in_the_folder_are_refused(
    tmp_path: Path, name: str, kind: bytes, message: str
) -> None:
    path = write_tar(tmp_path / "a.tar", [(_info("0.png"), b"x"), (_info(name, kind), b"")])
    with pytest.raises(UserError, match=f"a.tar: .*{message}") as caught:
        walk(path)
    assert "\n" not in str(caught.value)


def test_folders_of_a_tar_are_passed_over(tmp_path: Path) -> None:
    folder = _info("d", tarfile.DIRTYPE)
    members = [(folder, b""), (_info("d/a.png"), b"x"), (folder, b""), (_info("d/a.txt"), b"y"), (folder, b"")]
    (found,) = walk(write_tar(tmp_path / "a.tar", members))
    assert found.key == "d/a"
    assert set(found.members) == {"png", "txt"}


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    info = _info("0.png")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000000"}
    path = write_tar(tmp_path / "a.tar", [(info, b"x")])
    with pytest.raises(UserError, match=r"member '0\.png': not a regular file"):
        walk(path)


@pytest.mark.parametrize("kind", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(_info("0.png"), b"x")], kind)
    with pytest.raises(UserError, match=r"a\.tar: compressed with .*; decompress it"):
        walk(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:700],  # inside a member
        lambda content: content[: 3 * 512],  # between two, where Python's tarfile sees an end
        lambda content: content[:1536] + b"x" * 512 + content[2048:],  # a header, where it sees one too
        lambda content: content + content,
        lambda content: b"",
        lambda content: b"not a tar" * 1000,
    ],
)
def test_damaged_tars_are_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = write_tar(tmp_path / "a.tar", [(_info(f"{number}.png"), b"x" * 600) for number in range(3)])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar: ") as caught:
        walk(path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [b"-0000000001\0", b"\xff" * 12], ids=["octal", "binary"])
def test_a_member_of_negative_size_ends_with_one_line_and_not_never(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [(_info(f"{number}.png"), b"x" * 600) for number in range(2)])
    content = bytearray(path.read_bytes())
    start = 1536
    content[start + 124 : start + 136] = size
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"\A[^\n]*a\.tar: [^\n]*\Z"):
        walk(path)


FIELDS = {"name": 0, "size": 124, "time": 136, "type": 156, "link": 157}
VALUES = (
    *(b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-1\0", b"0000000-001\0", b"abc", b"\0" * 12),
    *(b"x", b"g", b"L", b"S", b"K", b"V", b"2", b"../../../etc/passwd\0"),
)
RECORDS = (
    *(b"30 size=99999999999999999999999", b"30 GNU.sparse.map=1,2,3,4,5,6\n", b"30 GNU.sparse.size=xx\n"),
    *(b"99 path=\n", b"30 GNU.sparse.major=1\n30 GNU.sp"),
)


def seal(tar: bytearray, start: int) -> None:
    """Make the checksum of a header that of its bytes."""
    tar[start + 148 : start + 156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])


AT_LENGTH = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(3000)]


@pytest.mark.parametrize("examples", [300, pytest.param(20_000, marks=AT_LENGTH)])
def test_whatever_headers_say_the_tar_is_read_or_refused_in_one_line(tmp_path: Path, examples: int) -> None:
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 3), st.sampled_from(sorted(FIELDS)), st.sampled_from(VALUES)),
            min_size=1,
            max_size=4,
        ),
        record=st.none() | st.sampled_from(RECORDS),
        cut=st.none() | st.integers(0, 6000),
    )
    @settings(max_examples=examples)
    def check(changes: list[tuple[int, str, bytes]], record: bytes | None, cut: int | None) -> None:
        check_headers(tmp_path / "a.tar", changes, record, cut)

    check()


def check_headers(path: Path, changes: list[tuple[int, str, bytes]], record: bytes | None, cut: int | None) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("a.jpg", "a.label.png", "b.jpg", "c.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 512
            archive.addfile(info, io.BytesIO(bytes(512)))
    tar = bytearray(buffer.getvalue())
    for member, field, value in changes:
        place = 1024 * member + FIELDS[field]
        tar[place : place + len(value)] = value
        seal(tar, 1024 * member)
    if record is not None:
        tar[1024 + 124 : 1024 + 136], tar[1024 + 156 : 1024 + 157] = b"%011o\0" % len(record), b"x"
        tar[1536 : 1536 + len(record)] = record
        seal(tar, 1024)
    path.write_bytes(tar[:cut])
    message = ""
    try:
        walk(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_headers_nested_a_thousand_times_are_refused_in_one_line(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    nested = bytearray(header[:156] + b"x" + header[157:])
    seal(nested, 0)
    (tmp_path / "a.tar").write_bytes(bytes(nested) * 2000)
    with pytest.raises(UserError, match="not a readable tar") as refused:
        walk(tmp_path / "a.tar")
    assert "\n" not in str(refused.value)


def _sparse(path: Path, header: tarfile.TarInfo, size: int) -> Path:
    """A tar of one header and a hole of so many bytes, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT if header.size < 1 << 33 else tarfile.GNU_FORMAT))
        file.truncate(size)
    return path


@pytest.mark.timeout(20)
def test_a_tar_of_a_terabyte_of_nothing_is_refused_at_once(tmp_path: Path) -> None:
    small, large, header = _info("a.png"), _info("b.png"), _info("pax", tarfile.XHDTYPE)
    large.size, header.size = 1 << 40, 8 << 30
    for name, info, words in (
        ("empty", small, "bytes after its last member"),
        ("member", large, r"member 'b\.png': 1,099,511,627,776 bytes"),
        ("header", header, r"not a readable tar \(a header of 8,589,934,592 bytes\)"),
    ):
        path = _sparse(tmp_path / f"{name}.tar", info, (1 << 40) + 4096)
        with pytest.raises(UserError, match=rf"{name}\.tar: .*{words}") as refused:
            walk(path)
        assert "\n" not in str(refused.value)
