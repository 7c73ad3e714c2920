"""Remote shards, over http(s) or S3, and downloads that survive a flaky connection."""

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
class RetryPolicy:
    """Retry policy of a download."""

    timeout: float = 30.0
    """Seconds without any data after which an attempt fails."""
    retries: int = 6
    """Number of attempts after the first one."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled for each later one up to 30, and reduced at random by up to half."""


class Cancelled(Exception):
    """Raised when a download is cancelled by its caller."""


class _TransientError(Exception):
    """An error that the next attempt may not have."""


class _BadRange(_TransientError):
    """The object has no bytes at the offset from which the transfer should resume."""


class _Body(NamedTuple):
    start: int
    """Offset of the body's first byte in the object."""
    chunks: Iterator[bytes]


def is_remote(location: str) -> bool:
    """Whether a location is remote (http, https, s3), so that shards must be downloaded.

    Raises:
        UserError: the URL is incomplete or has another scheme, such as `pipe:`; nothing is ever executed.
    """
    match = _SCHEME.match(location)
    if match is None:
        return False
    scheme = match[1].lower()
    if scheme not in ("http", "https", "s3"):
        raise UserError(
            f"shards {scheme}: unknown URL scheme; give a local folder (begin with ./ if its name has a colon) or an "
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
            f"shards {redact(location)}: write only s3://bucket/prefix; keys and endpoint belong in the AWS settings "
            "(AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )
    return True


def redact(url: str) -> str:
    """Remove user, password, query and fragment from a URL, for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def object_url(location: str, name: str) -> str:
    """URL of a file in a remote folder; the folder's query, which may be a signature, is kept."""
    parts = urlsplit(location)
    quoted = name if parts.scheme == "s3" else quote(name)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quoted}", parts.query, ""))


def download(
    url: str, file: IO[bytes], *, most: int, retry: RetryPolicy, cancelled: threading.Event | None = None
) -> None:
    """Download an object into a file; an interrupted transfer resumes at its offset, if the server supports it.

    Args:
        url: http, https or s3 URL.
        file: Seekable file; afterwards it contains the object only.
        most: Size limit of the object, in bytes.
        retry: Retry policy.
        cancelled: Stops the download once it is set.

    Raises:
        UserError: the object is missing, forbidden or larger than `most`, or all attempts have failed.
        OSError: the file cannot be written.
        Cancelled: `cancelled` was set.
    """
    cancelled = cancelled or threading.Event()
    # Do not advance Python's global generator: training code may draw from it.
    jitter = SystemRandom()
    file.seek(0)
    for attempt in range(retry.retries + 1):
        try:
            _transfer(url, file, most, retry.timeout, cancelled)
            file.truncate()
            return
        except _TransientError as error:
            if attempt == retry.retries:
                raise UserError(
                    f"{redact(url)}: {error}, {attempt + 1} attempts; check that the server is reachable and restart"
                ) from None
            if isinstance(error, _BadRange):
                file.seek(0)
        cancelled.wait(min(retry.backoff * 2**attempt, _LONGEST_WAIT) * jitter.uniform(0.5, 1.0))


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
                    f"{redact(url)}: larger than the limit of {most} bytes; the file was changed or is not part of a "
                    "shard folder: check the location, or upload the folder again"
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
        # The texts of these exceptions contain whole URLs, including secrets.
        _check_certificate(url, error, "REQUESTS_CA_BUNDLE")
        if isinstance(error, requests.Timeout) or (error.args and isinstance(error.args[0], ReadTimeoutError)):
            raise _TransientError(f"no data for {timeout:g} s") from None
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            raise _TransientError("the transfer was interrupted") from None
        if isinstance(error, requests.ConnectionError):
            raise _TransientError("no connection") from None
        raise UserError(f"{redact(url)}: cannot be fetched ({type(error).__name__}); check the URL") from None


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
        raise _TransientError("an error without an HTTP status") from None
    except (ConnectionError, HTTPClientError, IncompleteReadError, HTTPError) as error:
        _check_certificate(url, error, "AWS_CA_BUNDLE")
        raise _TransientError(f"no connection, or an interrupted one ({type(error).__name__})") from None
    except BotoCoreError as error:
        raise UserError(
            f"{redact(url)}: {type(error).__name__}; check the bucket's name and the AWS settings"
        ) from None


def _check_status(url: str, status: int, credentials: str) -> None:
    if status in (200, 206):
        return
    if status == 416:
        raise _BadRange("the file changes its size")
    if status >= 500 or status in (408, 425, 429):
        raise _TransientError(f"HTTP {status}")
    if status in (401, 403):
        raise UserError(
            f"{redact(url)}: HTTP {status}, access denied (S3 returns this for missing objects too); "
            f"check the location and {credentials}"
        )
    if status in (404, 410):
        raise UserError(
            f"{redact(url)}: HTTP {status}, not found; check the location, or upload the shard folder again"
        )
    raise UserError(f"{redact(url)}: HTTP {status}; check the location")


def _check_certificate(url: str, error: Exception, variable: str) -> None:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise UserError(f"{redact(url)}: certificate not trusted; set {variable} to your CA file") from None


def _first_byte(content_range: str | None) -> int:
    match = re.match(r"bytes (\d+)-", content_range or "")
    return int(match[1]) if match else 0


# A connection must not be shared by two threads, or by two processes, such as forked loader workers.
@lru_cache(maxsize=8)
def _http_session(process: int, thread: int) -> requests.Session:
    # The debug messages of urllib3 contain queries.
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
        # The manifest's SHA-256 is checked; not every S3-compatible server supports the SDK's own checksums.
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
