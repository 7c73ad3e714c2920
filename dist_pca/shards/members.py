"""Parse a slice of a tar in memory: the members of one sample, from trusted or untrusted shards."""

import io
import re
import tarfile

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_PLAIN_HEADER = re.compile(
    rb"([\0 -~]{100})"  # name
    rb"(?:[0-7]{7}[\0 ]){3}"  # mode, user, group
    rb"([0-7]{11})[\0 ]"  # size
    rb"[0-7]{11}[\0 ]"  # time
    rb"([0-7]{6})\0 "  # checksum
    rb"0\0{100}"  # a regular file, so no link's target
    rb"ustar(?:\x0000|  \0).{64}"  # names of user and group
    rb"(?:[0-7]{7}\0|\0{8}){2}"  # device
    rb"\0{155}.{12}",  # no prefix to the name
    re.DOTALL,
)


def members_of(content: bytes, key: str) -> dict[str, bytes]:
    """Read the contents of a sample's members, by extension in lower case.

    Only regular, non-sparse files whose names begin with the key and a dot are returned.

    Args:
        content: The sample's headers and blocks, without an end mark.
        key: The sample's key.

    Raises:
        tarfile.TarError: the bytes are not a tar, or a member extends beyond them.
        ValueError: a number in a header cannot be parsed.
    """
    found = _plain_members(content)
    if found is None:
        found = _tar_members(content)
    prefix = f"{key}."
    return {name.removeprefix(prefix).lower(): value for name, value in found if name.startswith(prefix)}


def _plain_members(content: bytes) -> list[tuple[str, bytes]] | None:
    """Names and contents in a tar of regular files with short ASCII names, which is how `writer` writes shards.

    None for any other or damaged tar; `tarfile` handles those, but is several times slower.
    """
    members = []
    offset = 0
    while offset < len(content):
        header = content[offset : offset + tarfile.BLOCKSIZE]
        fields = _PLAIN_HEADER.fullmatch(header)
        if fields is None:
            return None
        name, size, checksum = fields[1].partition(b"\0")[0], int(fields[2], 8), int(fields[3], 8)
        start = offset + tarfile.BLOCKSIZE
        # By definition the checksum treats its own eight bytes as blanks.
        if start + size > len(content) or sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
            return None
        members.append((name.decode("ascii"), content[start : start + size]))
        offset = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return members


def _tar_members(content: bytes) -> list[tuple[str, bytes]]:
    members = []
    # Mode "r:" refuses compression, and `issparse` excludes sparse files: neither may expand a few bytes to many.
    with tarfile.open(fileobj=io.BytesIO(content + _END_OF_ARCHIVE), mode="r:") as archive:
        for member in archive:
            # With negative sizes, some versions of `tarfile` move backwards and never end.
            if member.size < 0:
                raise tarfile.ReadError("a member of negative size")
            if member.isreg() and not member.issparse():
                if member.offset_data + member.size > len(content):
                    raise tarfile.ReadError("a member extends beyond the sample")
                stream = archive.extractfile(member)
                if stream is not None:
                    members.append((member.name, stream.read()))
    return members
