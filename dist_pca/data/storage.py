"""Where shards lie: a local folder, http(s) or S3; and how one object is brought from there over a bad line."""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from random import SystemRandom
from typing import IO, Any, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from dist_pca.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CHUNK = 1 << 16
_LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class Patience:
    """How long a download bears with a bad line."""

    timeout: float = 30.0
    """Seconds without a byte after which an attempt has failed."""
    retries: int = 6
    """Attempts after the first one."""
    backoff: float = 1.0
    """Seconds before the second attempt, doubled for each later one up to 30, less up to half of it at random."""


class Cancelled(Exception):
    """Whoever asked for a download no longer wants it."""


class _Passing(Exception):
    """A fault that the next attempt may not meet."""


class _BadRange(_Passing):
    """The object has no bytes where the transfer was to go on."""


class _Body(NamedTuple):
    start: int
    """Offset of the first byte in the object."""
    chunks: Iterator[bytes]


def is_remote(location: str) -> bool:
    """Whether shards are fetched (http, https, s3) rather than read where they are.

    Raises:
        UserError: the URL is incomplete or has any other scheme; `pipe:` is one of them, nothing is ever executed.
    """
    match = _SCHEME.match(location)
    if match is None:
        return False
    scheme = match[1].lower()
    if scheme not in ("http", "https", "s3"):
        raise UserError(
            f"shards {scheme}: cannot be read from; give a local folder (./ before it if its name has a colon) or an "
            "http://, https:// or s3:// URL"
        )
    try:
        url = urlsplit(location)
        complete = bool(url.hostname) and url.port != 0
    except ValueError:
        complete = False
    if not complete:
        raise UserError(f"shards {scheme}: incomplete URL; write {scheme}://host/path or s3://bucket/prefix")
    if scheme == "s3" and (url.username or url.password or url.port or url.query):
        raise UserError(
            f"shards {shown(location)}: write s3://bucket/prefix alone; keys and endpoint belong into the AWS settings "
            "(AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )
    return True


def shown(url: str) -> str:
    """A URL as messages may show it: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def object_url(location: str, name: str) -> str:
    """URL of a file in a remote folder; the folder's query, which may be a signature, is the file's too."""
    parts = urlsplit(location)
    quoted = name if parts.scheme == "s3" else quote(name)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quoted}", parts.query, ""))


def download(
    url: str, file: IO[bytes], *, most: int, patience: Patience, cancelled: threading.Event | None = None
) -> None:
    """Write an object into a file; a transfer that broke off goes on where it was, if the server can.

    Args:
        url: http, https or s3.
        file: Seekable; holds the object alone afterwards.
        most: Bytes the object may have.
        patience: When to try again, and how often.
        cancelled: Ends the download once it is set.

    Raises:
        UserError: the object is not there, not allowed or larger than `most`, or all attempts have failed.
        OSError: the file does not take the bytes.
        Cancelled: `cancelled` was set.
    """
    cancelled = cancelled or threading.Event()
    # Python's global generator is not ours to move: whoever trains may draw from it.
    jitter = SystemRandom()
    file.seek(0)
    for attempt in range(patience.retries + 1):
        try:
            _transfer(url, file, most, patience.timeout, cancelled)
            file.truncate()
            return
        except _Passing as fault:
            if attempt == patience.retries:
                raise UserError(
                    f"{shown(url)}: {fault}, {attempt + 1} attempts; see that the server is reachable and start again"
                ) from None
            if isinstance(fault, _BadRange):
                file.seek(0)
        cancelled.wait(min(patience.backoff * 2**attempt, _LONGEST_WAIT) * jitter.uniform(0.5, 1.0))


def _transfer(url: str, file: IO[bytes], most: int, timeout: float, cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Cancelled
    opened = _s3_body if urlsplit(url).scheme == "s3" else _http_body
    with opened(url, file.tell(), timeout) as body:
        file.seek(body.start)
        for chunk in body.chunks:
            if cancelled.is_set():
                raise Cancelled
            if file.tell() + len(chunk) > most:
                raise UserError(
                    f"{shown(url)}: more than the {most} bytes there may be; the file was changed or is not a shard "
                    "folder's: check the location, upload the folder again"
                )
            file.write(chunk)


@contextmanager
def _http_body(url: str, start: int, timeout: float) -> Iterator[_Body]:
    session = _http_session(os.getpid(), threading.get_ident())
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            _check_status(url, answer.status_code, "the query of the URL or the .netrc file")
            yield _Body(_first_byte(answer.headers.get("Content-Range")), answer.iter_content(_CHUNK))
    except requests.RequestException as error:
        # Their texts hold whole URLs, secrets included.
        _check_certificate(url, error, "REQUESTS_CA_BUNDLE")
        if isinstance(error, requests.Timeout) or (error.args and isinstance(error.args[0], ReadTimeoutError)):
            raise _Passing(f"no bytes for {timeout:g} s") from None
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            raise _Passing("the transfer broke off") from None
        if isinstance(error, requests.ConnectionError):
            raise _Passing("no connection") from None
        raise UserError(f"{shown(url)}: cannot be fetched ({type(error).__name__}); check the URL") from None


@contextmanager
def _s3_body(url: str, start: int, timeout: float) -> Iterator[_Body]:
    client = _s3_client(os.getpid(), timeout)
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, IncompleteReadError

    parts = urlsplit(url)
    try:
        answer = client.get_object(
            Bucket=parts.netloc, Key=parts.path[1:], **({"Range": f"bytes={start}-"} if start else {})
        )
        with closing(answer["Body"]) as stream:
            yield _Body(_first_byte(answer.get("ContentRange")), stream.iter_chunks(_CHUNK))
    except ClientError as error:
        _check_status(url, error.response["ResponseMetadata"]["HTTPStatusCode"], "the AWS settings (AWS_PROFILE)")
        raise _Passing("an error that has no status") from None
    except (ConnectionError, HTTPClientError, IncompleteReadError, HTTPError) as error:
        _check_certificate(url, error, "AWS_CA_BUNDLE")
        raise _Passing(f"no connection, or one that broke off ({type(error).__name__})") from None
    except BotoCoreError as error:
        raise UserError(f"{shown(url)}: {type(error).__name__}; check the bucket's name and the AWS settings") from None


def _check_status(url: str, status: int, credentials: str) -> None:
    if status in (200, 206):
        return
    if status == 416:
        raise _BadRange("the file grows or shrinks")
    if status >= 500 or status in (408, 425, 429):
        raise _Passing(f"HTTP {status}")
    if status in (401, 403):
        raise UserError(
            f"{shown(url)}: HTTP {status}, not allowed (S3 answers so for missing objects too); "
            f"check the location and {credentials}"
        )
    if status in (404, 410):
        raise UserError(f"{shown(url)}: HTTP {status}, not there; check the location, or upload the shard folder again")
    raise UserError(f"{shown(url)}: HTTP {status}; check the location")


def _check_certificate(url: str, error: Exception, variable: str) -> None:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise UserError(f"{shown(url)}: certificate not trusted; name your authority's file in {variable}") from None


def _first_byte(content_range: str | None) -> int:
    match = re.match(r"bytes (\d+)-", content_range or "")
    return int(match[1]) if match else 0


# A connection must be used neither by two processes, which forked loader workers would do, nor by two threads.
@lru_cache(maxsize=8)
def _http_session(process: int, thread: int) -> requests.Session:
    # Its debug lines hold queries.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
    return requests.Session()


@lru_cache(maxsize=2)
def _s3_client(process: int, timeout: float) -> Any:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError("shards s3: reading from S3 needs boto3; pip install 'dist-pca[s3]'") from None
    config = Config(
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"total_max_attempts": 1},
        # The manifest's SHA-256 is checked; not every S3-compatible server knows the SDK's own sums.
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session()
        if session.get_credentials() is None:
            config = config.merge(Config(signature_version=UNSIGNED))
        return session.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(
            f"shards s3: {type(error).__name__}; check the AWS settings (AWS_PROFILE, AWS_ENDPOINT_URL)"
        ) from None
