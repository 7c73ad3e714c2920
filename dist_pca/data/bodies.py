"""The bytes of one remote object, from an offset on: over http(s), from S3, or by fsspec."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from dist_pca.data.addresses import FSSPEC_PACKAGES, redact
from dist_pca.errors import UserError

_CHUNK = 1 << 16


class TransientError(Exception):
    """An error that the next attempt may not have."""


class BadRange(TransientError):
    """The object has no bytes at the offset from which the transfer should resume."""


class Body(NamedTuple):
    """The bytes of an object from an offset on."""

    start: int
    """Offset of the first byte in the object."""
    chunks: Iterator[bytes]


@contextmanager
def open_body(url: str, start: int, timeout: float) -> Iterator[Body]:
    """Open an object at an offset; servers that cannot do that give all of it.

    Args:
        url: URL of an object, for which `is_remote` is true.
        start: Offset of the first byte.
        timeout: Seconds without any data after which http(s) and S3 fail; by fsspec it is the package's own.

    Raises:
        UserError: the object is missing or forbidden, or a package is missing.
        TransientError: the next attempt may succeed.
    """
    scheme = urlsplit(url).scheme
    opened = _s3_body if scheme == "s3" else _fsspec_body if scheme in FSSPEC_PACKAGES else _http_body
    with opened(url, start, timeout) as body:
        yield body


@contextmanager
def _http_body(url: str, start: int, timeout: float) -> Iterator[Body]:
    # The debug messages of urllib3 contain queries.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.Session() as session, session.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            _check_status(url, answer.status_code, "the query of the URL or the .netrc file")
            yield Body(_first_byte(answer.headers.get("Content-Range")), answer.iter_content(_CHUNK))
    except (requests.RequestException, HTTPError) as error:
        # The texts of these exceptions contain whole URLs, including secrets.
        _check_certificate(url, error, "REQUESTS_CA_BUNDLE")
        if isinstance(error, requests.Timeout) or (error.args and isinstance(error.args[0], ReadTimeoutError)):
            raise TransientError(f"no data for {timeout:g} s") from None
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            raise TransientError("the transfer was interrupted") from None
        if isinstance(error, requests.ConnectionError):
            raise TransientError("no connection") from None
        raise UserError(f"{redact(url)}: cannot be fetched ({type(error).__name__}); check the URL") from None


@contextmanager
def _s3_body(url: str, start: int, timeout: float) -> Iterator[Body]:
    client = _s3_client(os.getpid(), timeout)
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, IncompleteReadError

    bucket, _, key = url.removeprefix("s3://").partition("/")
    try:
        answer = client.get_object(Bucket=bucket, Key=key, **({"Range": f"bytes={start}-"} if start else {}))
        with closing(answer["Body"]) as stream:
            yield Body(_first_byte(answer.get("ContentRange")), stream.iter_chunks(_CHUNK))
    except ClientError as error:
        _check_status(url, error.response["ResponseMetadata"]["HTTPStatusCode"], "the AWS settings (AWS_PROFILE)")
        raise TransientError("an error without an HTTP status") from None
    except (ConnectionError, HTTPClientError, IncompleteReadError, HTTPError) as error:
        _check_certificate(url, error, "AWS_CA_BUNDLE")
        raise TransientError(f"no connection, or an interrupted one ({type(error).__name__})") from None
    except BotoCoreError as error:
        raise UserError(
            f"{redact(url)}: {type(error).__name__}; check the bucket's name and the AWS settings"
        ) from None


@contextmanager
def _fsspec_body(url: str, start: int, timeout: float) -> Iterator[Body]:
    scheme = urlsplit(url).scheme
    try:
        import fsspec
    except ImportError:
        raise UserError(f"shards {scheme}: reading {scheme}:// needs fsspec; pip install 'dist-pca[remote]'") from None
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        package = FSSPEC_PACKAGES[scheme]
        raise UserError(f"shards {scheme}: reading {scheme}:// needs {package}; pip install {package}") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
        with system.open(path, "rb") as file:
            file.seek(start)
            yield Body(start, iter(partial(file.read, _CHUNK), b""))
    except FileNotFoundError:
        raise UserError(f"{redact(url)}: not found; check the location, or upload the shard folder again") from None
    except PermissionError:
        raise UserError(f"{redact(url)}: access denied; check the settings of {FSSPEC_PACKAGES[scheme]}") from None
    except Exception as error:  # each package has exceptions of its own, whose texts may contain secrets
        codes = (getattr(error, name, None) for name in ("status", "status_code", "code"))
        for code in codes:
            if isinstance(code, int) and code >= 400:
                _check_status(url, code, f"the settings of {FSSPEC_PACKAGES[scheme]}")
        raise TransientError(type(error).__name__) from None


def _check_status(url: str, status: int, credentials: str) -> None:
    if status in (200, 206):
        return
    if status == 416:
        raise BadRange("the file changes its size")
    if status >= 500 or status in (408, 425, 429):
        raise TransientError(f"HTTP {status}")
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


# A client must not be shared by two processes, such as forked loader workers.
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
