"""Addresses of shard folders: which are remote, the files in them, and brace lists of their shards."""

import math
import re
from urllib.parse import quote, urlsplit, urlunsplit

from braceexpand import braceexpand

from dist_pca.errors import UserError

FSSPEC_PACKAGES = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
    "oci": "ocifs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
}
"""Package that fsspec needs for each URL scheme that is read by it."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_MOST_SHARDS = 1_000_000


def is_remote(location: str) -> bool:
    """Whether a location is remote (http, https, s3, or read by fsspec), so that shards must be downloaded.

    Raises:
        UserError: the URL is incomplete or has another scheme, such as `pipe:`; nothing is ever executed.
    """
    match = _SCHEME.match(location)
    if match is None:
        return False
    scheme = match[1].lower()
    if scheme not in ("http", "https", "s3", *FSSPEC_PACKAGES):
        raise UserError(
            f"shards {scheme}: unknown URL scheme; give a local folder (begin with ./ if its name has a colon) or an "
            f"http://, https://, s3://, {'://, '.join(FSSPEC_PACKAGES)}:// URL"
        )
    try:
        url = urlsplit(location)
        (url.hostname or "").encode("idna")
        complete = location[match.end() :].startswith("//") and bool(url.hostname) and url.port != 0
    except ValueError:  # also a host that is no name in the DNS
        complete = False
    if not complete or not location.isprintable() or " " in url.netloc:
        raise UserError(f"shards {scheme}: incomplete URL; write {scheme}://host/path or s3://bucket/prefix")
    if scheme in ("http", "https"):
        return True
    # What precedes @ is a container in abfs://container@account, and a secret elsewhere.
    secret = url.password or (url.username and scheme not in ("abfs", "abfss"))
    if "::" in location or url.query or secret or (url.port and scheme != "hdfs"):
        settings = (
            "the AWS settings (AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
            if scheme == "s3"
            else f"the settings of {FSSPEC_PACKAGES[scheme]}"
        )
        raise UserError(
            f"shards {redact(location)}: write only {scheme}://bucket/prefix; keys and endpoint belong in {settings}"
        )
    return True


def redact(location: str) -> str:
    """Remove user, password, query and fragment from a URL, for messages; a path stays as it is."""
    if "://" not in location:
        return location
    try:
        parts = urlsplit(location)
    except ValueError:  # what is no URL may still hold a secret
        return f"{location.partition(':')[0]}://..."
    host = parts.netloc
    if not (parts.scheme in ("abfs", "abfss") and parts.password is None):
        host = host.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def object_url(location: str, name: str) -> str:
    """URL of a file in a remote folder; the folder's query, which may be a signature, is kept.

    Args:
        location: URL of the folder, which may end in the shards to use.
        name: Name of the file.
    """
    folder = _split(location)[0]
    if not folder.startswith(("http://", "https://")):
        # Names of objects may hold what ends a path elsewhere, such as # and ?.
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quote(name)}", parts.query, ""))


def split_shards(location: str) -> tuple[str, list[str] | None]:
    """Separate a location that ends in the shards to use, as WebDataset writes them, into the folder and their names.

    `data/shard-{000000..000009}.tar` are ten shards of the folder `data`, and `data/shard-000003.tar` is one of them.
    The names are None for a folder, of which all shards are used.

    Raises:
        UserError: the braces are unbalanced, stand in the folder's name, or list too many shards.
    """
    folder, pattern = _split(location)
    if re.search(r"\{[^/{}]*(\.\.|,)[^/{}]*\}", folder):
        raise UserError(
            f"shards {redact(location)}: braces in the name of a folder stand for several, and each has a "
            "manifest.json of its own; list the folders one by one"
        )
    if pattern is None:
        return location, None
    shards = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if shards > _MOST_SHARDS:
        raise UserError(f"shards {redact(location)}: lists {shards:,} shards; list at most {_MOST_SHARDS:,}")
    try:
        return folder, list(dict.fromkeys(braceexpand(pattern)))
    except ValueError:
        raise UserError(f"shards {redact(location)}: unbalanced braces; write shard-{{000000..000009}}.tar") from None


def _split(location: str) -> tuple[str, str | None]:
    """Folder, and pattern of the shards if the location does not end in the folder."""
    address, query = location, ""
    if "://" in location:
        address, mark, rest = location.partition("?")
        query = mark + rest
    folder, slash, pattern = address.rpartition("/")
    if not pattern.lower().endswith(".tar"):
        return location, None
    return (folder or slash or ".") + query, pattern
