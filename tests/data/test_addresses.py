"""Which locations are remote, what is shown of them, and the shards that they may end in."""

from pathlib import Path

import pytest

from dist_pca.data.addresses import is_remote, object_url, redact, split_shards
from dist_pca.errors import UserError

ONE_LINE = r"\A[^\n]+\Z"


@pytest.mark.parametrize("location", ["data/gta5", "/data/gta5", "~/x", "./pipe:cat", "..", "data/a:b"])
def test_a_path_is_local(location: str) -> None:
    assert not is_remote(location)


@pytest.mark.parametrize(
    "location",
    [
        *("http://host/a", "https://host:8443/a/b?x=y", "s3://bucket", "S3://bucket/prefix/", "gs://bucket/shards"),
        *("az://container/shards", "abfs://container@account.dfs.core.windows.net/x", "hf://datasets/user/name@rev/x"),
        *("hdfs://host:8020/x", "oss://bucket/x", "s3://bucket/shard-{000000..000009}.tar"),
    ],
)
def test_http_s3_and_what_fsspec_reads_are_remote(location: str) -> None:
    assert is_remote(location)


@pytest.mark.parametrize(
    "location",
    [
        "pipe:touch executed",
        "pipe://touch executed",
        "file:///data",
        "memory://x",
        "simplecache::s3://b/x",
        "cached://x",
        "ftp://user:sesame@h/x",
        "gopher:x",
    ],
)
def test_any_other_scheme_is_refused_in_one_line_and_nothing_is_executed(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=ONE_LINE) as caught:
        is_remote(location)
    assert "s3://" in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "location",
    [
        "http:",
        "https://",
        "http://host:port/x",
        "http://[::1/x",
        "s3:///x",
        "s3://access:sesame@bucket/x",
        "s3://b:9000/x",
        "s3:/bucket/x",
        "https:host/x",
        "gs:bucket/x",
        "http://host name/x",
        "http://host/a\nb",
        "http:///x",
        "http://host:99999/x",
        "s3://",
        "http://a..b/x",
        "http://.../x",
        f"http://{'a' * 70}.b/x",
    ],
)
def test_an_incomplete_url_and_keys_in_an_s3_url_are_refused_in_one_line(location: str) -> None:
    with pytest.raises(UserError, match=ONE_LINE) as caught:
        is_remote(location)
    assert "s3://bucket/prefix" in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        "gs://user:sesame@b/x",
        "gs://sesame@b/x",
        "az://b/x?sig=sesame",
        "abfs://c:sesame@a/x",
        "gs://b/x::s3://sesame/y",
    ],
)
def test_secrets_and_chains_in_other_urls_are_refused_in_one_line(location: str) -> None:
    with pytest.raises(UserError, match=ONE_LINE) as caught:
        is_remote(location)
    assert "settings of" in str(caught.value)
    assert "sesame@" not in str(caught.value)
    assert "=sesame" not in str(caught.value)


def test_a_file_s_url_keeps_user_and_query_and_a_redacted_one_has_neither() -> None:
    url = object_url("https://user:sesame@host:8443/shards/?signature=sesame#top", "shard 1.tar")
    assert url == "https://user:sesame@host:8443/shards/shard%201.tar?signature=sesame"
    assert redact(url) == "https://host:8443/shards/shard%201.tar"
    assert object_url("s3://bucket", "shard 1.tar") == "s3://bucket/shard 1.tar"
    assert object_url("s3://bucket/run#1/x/", "what?#1.tar") == "s3://bucket/run#1/x/what?#1.tar"


@pytest.mark.parametrize("path", ["data/run#1", "what?", "//host/share", "me@home/x", ""])
def test_a_path_is_not_redacted(path: str) -> None:
    assert redact(path) == path


def test_of_what_is_no_url_after_all_the_scheme_is_left() -> None:
    assert redact("https://me:sesame@[::1/x") == "https://..."


@pytest.mark.parametrize(
    ("location", "folder", "names"),
    [
        ("data/shards", "data/shards", None),
        ("s3://b/x/", "s3://b/x/", None),
        ("data/shard-{000008..000010}.tar", "data", [f"shard-0000{n}.tar" for n in ("08", "09", "10")]),
        ("https://h/x/{a,b}-{1..2}.tar?sig=1/2", "https://h/x?sig=1/2", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("s3://b/shard-000003.tar", "s3://b", ["shard-000003.tar"]),
        ("a.tar", ".", ["a.tar"]),
        ("/a.tar", "/", ["a.tar"]),
        ("x/{1,1}.tar", "x", ["1.tar"]),
    ],
)
def test_a_location_may_end_in_shards(location: str, folder: str, names: list[str] | None) -> None:
    assert split_shards(location) == (folder, names)
    if "://" in location:
        joined = object_url(location, "manifest.json")
        assert joined == folder.rstrip("/").replace("?", "/manifest.json?") + (
            "" if "?" in folder else "/manifest.json"
        )


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3://b/{day,night}/shard-{0..9}.tar", "braces in the name of a folder"),
        ("data/{0..3}", "braces in the name of a folder"),
        ("data/shard-{0..9.tar", "unbalanced braces"),
        ("data/shard-{0..9999999}.tar", "lists 10,000,000 shards"),
        ("data/{0..9999}{0..9999}{0..9999}.tar", "lists 1,000,000,000,000 shards"),
    ],
)
def test_lists_that_cannot_be_used_are_refused_in_one_line(location: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"\Ashards [^\n]*{message}[^\n]*\Z"):
        split_shards(location)
