import io
import logging
import multiprocessing
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from moto.server import ThreadedMotoServer

from dist_pca.data.remote import Cancelled, RetryPolicy, download
from dist_pca.errors import UserError
from tests.data.servers import FolderServer, serving

CONTENT = random.Random(0).randbytes(1_000_000)
QUICK = RetryPolicy(timeout=20, retries=3, backoff=0.02)
ONE_LINE = r"\A[^\n]+\Z"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    (tmp_path / "bucket/shards").mkdir(parents=True)
    (tmp_path / "bucket/shards/file").write_bytes(CONTENT)
    with serving(tmp_path) as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def url(request: pytest.FixtureRequest, server: FolderServer, aws: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same file over both protocols."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    return f"{endpoint}/bucket/shards/file" if request.param == "http" else "s3://bucket/shards/file"


def fetch(url: str, *, retry: RetryPolicy = QUICK, most: int = len(CONTENT)) -> bytes:
    file = io.BytesIO()
    download(url, file, most=most, retry=retry)
    return file.getvalue()


@pytest.mark.parametrize("url", ["http://*/x", "http://a..b/x", "http://ex%00ample/x", "http://:80/x"])
def test_an_address_that_cannot_be_fetched_ends_in_one_line(url: str) -> None:
    with pytest.raises(UserError, match=ONE_LINE):
        fetch(url, retry=replace(QUICK, retries=0))


def test_a_file_arrives_as_it_is(url: str) -> None:
    assert fetch(url) == CONTENT


def test_what_the_file_held_before_is_gone(url: str) -> None:
    file = io.BytesIO(bytes(2 * len(CONTENT)))
    download(url, file, most=len(CONTENT), retry=QUICK)
    assert file.getvalue() == CONTENT


@pytest.mark.parametrize("status", ["500", "503", "429", "425", "408"])
def test_an_answer_that_may_pass_is_tried_again(url: str, server: FolderServer, status: str) -> None:
    server.faults["file"].extend([status, status])
    assert fetch(url) == CONTENT
    assert server.asked("file") == 3


def test_a_broken_transfer_goes_on_where_it_was(url: str, server: FolderServer) -> None:
    server.faults["file"].extend(["cut", "503", "cut"])
    assert fetch(url) == CONTENT
    starts = [int(asked[6:-1]) for _, asked in server.requests if asked]
    assert len(starts) == 3
    assert len(CONTENT) // 2 - (1 << 16) <= starts[0] == starts[1] < starts[2]


def test_a_broken_transfer_starts_over_where_the_server_knows_no_ranges(url: str, server: FolderServer) -> None:
    server.ranges = False
    server.faults["file"].append("cut")
    assert fetch(url) == CONTENT


def test_a_server_that_stalls_in_mid_body_is_left_after_the_timeout(url: str, server: FolderServer) -> None:
    server.faults["file"].append("stall")
    start = time.monotonic()
    # The retry may be late too, on a loaded machine.
    assert fetch(url, retry=replace(QUICK, timeout=0.3, retries=20)) == CONTENT
    assert 0.3 <= time.monotonic() - start < QUICK.timeout


@pytest.mark.parametrize("fault", ["drip", "drip headers"])
def test_a_server_that_sends_a_byte_before_every_timeout_is_left(url: str, server: FolderServer, fault: str) -> None:
    impatient = replace(QUICK, min_rate=1000, rate_window=0.5)
    assert fetch(url) == CONTENT
    server.faults["file"].append(fault)
    start = time.monotonic()
    assert fetch(url, retry=impatient) == CONTENT
    assert time.monotonic() - start < QUICK.timeout
    server.faults["file"].extend([fault] * 2)
    with pytest.raises(
        UserError, match=rf"{ONE_LINE[:-2]}slower than 1000 bytes/s \(data\.cache\.min_rate\), 2 attempts"
    ):
        fetch(url, retry=replace(impatient, retries=1))


def test_a_slow_server_is_waited_for_where_there_is_no_least_rate(url: str, server: FolderServer) -> None:
    patient = replace(QUICK, min_rate=0, rate_window=0.1, retries=0)
    server.faults["file"].append("drip")
    cancelled = threading.Event()
    threading.Timer(1, cancelled.set).start()
    with pytest.raises(Cancelled):
        download(url, io.BytesIO(), most=len(CONTENT), retry=patient, cancelled=cancelled)


def test_a_file_that_became_shorter_than_what_was_taken_is_taken_afresh(url: str, server: FolderServer) -> None:
    server.faults["file"].extend(["cut", "416"])
    assert fetch(url) == CONTENT
    assert [asked is None for _, asked in server.requests] == [True, False, True]


def test_a_server_that_never_recovers_ends_in_one_line(url: str, server: FolderServer) -> None:
    server.faults["file"].extend(["503"] * 9)
    with pytest.raises(UserError, match=rf"{ONE_LINE[:-2]}HTTP 503, 4 attempts; check that the server is reachable"):
        fetch(url)
    assert server.asked("file") == 4


def test_no_server_at_all_ends_in_one_line(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for url in (f"http://user:sesame@127.0.0.1:{port}/file?key=sesame", "s3://bucket/file"):
        with pytest.raises(UserError, match=r"\A[^\n]+/file: [^\n]+ 4 attempts; [^\n]+\Z") as caught:
            fetch(url)
        assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "410"])
def test_a_final_answer_is_not_asked_for_twice(url: str, server: FolderServer, status: str) -> None:
    server.faults["file"].append(status)
    with pytest.raises(UserError, match=rf"\A[^\n]+bucket/shards/file: HTTP {status}[^\n]+check the location[^\n]*\Z"):
        fetch(url)
    assert server.asked("file") == 1


def test_a_file_larger_than_allowed_is_not_taken(url: str) -> None:
    with pytest.raises(UserError, match=r"\A[^\n]+file: larger than the limit of 999999 bytes[^\n]+\Z"):
        fetch(url, most=len(CONTENT) - 1)


def test_secrets_of_a_url_reach_the_server_but_neither_messages_nor_logs(
    server: FolderServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://user:sesame@127.0.0.1:{server.server_port}/bucket/shards/file?signature=sesame"
    server.faults["file"].extend(["500", "403"])
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        fetch(url)
    assert "sesame" not in str(caught.value) + caplog.text
    assert server.queries == ["signature=sesame"] * 2
    assert all(header and header.startswith("Basic ") for header in server.authorizations)


def test_forked_processes_do_not_talk_over_their_parent_s_connection(url: str) -> None:
    fork = multiprocessing.get_context("fork")
    assert fetch(url) == CONTENT
    patient = replace(QUICK, retries=0, min_rate=0)
    barrier, whole = fork.Barrier(4), fork.SimpleQueue()

    def fetch_often() -> None:
        barrier.wait()
        whole.put(all(fetch(url, retry=patient) == CONTENT for _ in range(5)))

    processes = [fork.Process(target=fetch_often) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
    assert [whole.get() for _ in processes if not whole.empty()] == [True] * 4


def test_waiting_draws_nothing_from_the_global_generator(url: str, server: FolderServer) -> None:
    server.faults["file"].append("500")
    state = random.getstate()
    fetch(url)
    assert random.getstate() == state


def test_a_download_that_nobody_wants_any_more_ends(url: str, server: FolderServer) -> None:
    server.faults["file"].extend(["503"] * 9)
    cancelled = threading.Event()
    retry = RetryPolicy(timeout=1, retries=9, backoff=60)
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(Cancelled):
        download(url, io.BytesIO(), most=1, retry=retry, cancelled=cancelled)


@pytest.fixture
def bucket(aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def test_an_object_is_read_from_an_s3_compatible_server(bucket: Any) -> None:
    bucket.put_object(Bucket="bucket", Key="a b/file+é", Body=CONTENT)
    assert fetch("s3://bucket/a b/file+é") == CONTENT


def test_a_missing_object_and_a_missing_bucket_are_final(bucket: Any) -> None:
    for url in ("s3://bucket/none", "s3://none/none"):
        with pytest.raises(UserError, match=rf"\A{url}: HTTP 404, not found; [^\n]+\Z"):
            fetch(url)


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_PROFILE", "nobody"), ("AWS_ENDPOINT_URL", "http://user:sesame@[::1"), ("AWS_PROFILE", "")]
)
def test_wrong_aws_settings_are_one_line(bucket: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    url = "s3://bucket/file" if value else "s3://not a bucket/file"
    with pytest.raises(UserError, match=r"\A[^\n]+ check [^\n]+AWS settings[^\n]*\Z") as caught:
        fetch(url)
    assert "sesame" not in str(caught.value)


def test_s3_without_boto3_says_what_to_install(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"\A[^\n]+pip install 'dist-pca\[s3\]'\Z"):
        fetch("s3://bucket/file")


class Bucket(LocalFileSystem):  # type: ignore[misc]
    """An object store of fsspec's: the folders below `root`."""

    protocol = "oss"
    root = Path()
    raises: list[Exception] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("oss://")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if self.raises:
            raise self.raises.pop(0)
        return (self.root / self._strip_protocol(path)).open(mode)


@pytest.fixture
def store(tmp_path: Path) -> type[Bucket]:
    (tmp_path / "bucket" / "a b").mkdir(parents=True)
    (tmp_path / "bucket" / "a b" / "file").write_bytes(CONTENT)
    Bucket.root, Bucket.raises = tmp_path, []
    fsspec.register_implementation("oss", Bucket, clobber=True)
    return Bucket


class HTTPStatus(Exception):
    def __init__(self, code: int) -> None:
        super().__init__("sesame")
        self.code = code


def test_an_object_is_read_by_fsspec(store: type[Bucket]) -> None:
    assert fetch("oss://bucket/a b/file") == CONTENT


def test_an_error_of_an_fsspec_package_is_tried_again_and_a_final_one_is_not(store: type[Bucket]) -> None:
    store.raises = [OSError("sesame"), HTTPStatus(503), TimeoutError()]
    assert fetch("oss://bucket/a b/file") == CONTENT
    for error, message in (
        (HTTPStatus(403), "HTTP 403, access denied"),
        (PermissionError(), "access denied; check the settings of ossfs"),
        (FileNotFoundError(), "not found; check the location"),
    ):
        store.raises = [error]
        with pytest.raises(UserError, match=rf"\Aoss://bucket/a b/file: {message}[^\n]*\Z") as caught:
            fetch("oss://bucket/a b/file")
        assert "sesame" not in str(caught.value)
    store.raises = [ValueError("sesame")] * 4
    with pytest.raises(UserError, match=r"\Aoss://bucket/a b/file: ValueError, 4 attempts; [^\n]+\Z"):
        fetch("oss://bucket/a b/file")


@pytest.mark.parametrize("scheme", ["gs", "az", "abfss", "oci"])
def test_a_scheme_whose_package_is_missing_says_what_to_install(scheme: str) -> None:
    package = {"gs": "gcsfs", "az": "adlfs", "abfss": "adlfs", "oci": "ocifs"}[scheme]
    with pytest.raises(UserError, match=rf"\Ashards {scheme}: [^\n]+pip install {package}\Z"):
        fetch(f"{scheme}://bucket/file")


def test_without_fsspec_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"pip install 'dist-pca\[remote\]'\Z"):
        fetch("gs://bucket/file")
