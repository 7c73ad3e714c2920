import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import Manifest, Shard, load_manifest, save_manifest
from tests.support.nasty import NASTY, STEPS, check_one_line, few_or_many, replaced
from tests.support.raw_data import make_folder
from tests.support.shards import make_shards


@pytest.fixture
def built(tmp_path: Path) -> Manifest:
    make_folder(tmp_path / "raw")
    return build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=3)


def test_what_was_saved_is_loaded(built: Manifest) -> None:
    assert load_manifest(built.folder) == built


def test_totals_are_those_of_all_shards(built: Manifest) -> None:
    assert len(built.shards) == 2
    assert built.samples == 4
    assert built.pixel_counts == [240, 240, 240]


def test_totals_without_labels_are_zero(tmp_path: Path) -> None:
    classes = (ClassInfo("a", (0, 0, 0)), ClassInfo("b", (1, 1, 1)))
    assert Manifest(tmp_path, "r", 1, "all", False, classes, ()).pixel_counts == [0, 0]


def test_the_folder_may_move(built: Manifest, tmp_path: Path) -> None:
    moved = built.folder.rename(tmp_path / "elsewhere")
    assert load_manifest(moved) == replace(built, folder=moved)
    assert "out" not in json.loads((moved / "manifest.json").read_text())


def test_twenty_five_thousand_samples_survive_saving_and_loading(tmp_path: Path) -> None:
    classes = tuple(ClassInfo(f"class {index}", (index, 0, 0)) for index in range(19))
    shards = []
    for number in range(100):
        name = f"shard-{number:06d}.tar"
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2 * 12345)
        column = [12345] * 250
        keys = [f"{number}_{index}" for index in range(250)]
        shards.append(Shard(name, 2 * 12345, "0" * 64, keys, column, column, column, column, [[123456] * 19] * 250))
    manifest = Manifest(tmp_path, "r", 1, "all", True, classes, tuple(shards))
    save_manifest(manifest)
    assert load_manifest(tmp_path) == manifest
    assert manifest.samples == 25_000


@pytest.mark.parametrize(
    ("column", "value"), [("offsets", -512), ("offsets", 2**70), ("lengths", 0), ("lengths", 2**45)]
)
def test_a_sample_outside_of_its_file_is_refused(built: Manifest, column: str, value: int) -> None:
    shard = built.shards[0]
    column_of: dict[str, Any] = {column: [value, *getattr(shard, column)[1:]]}
    moved = replace(shard, **column_of)
    save_manifest(replace(built, shards=(moved, *built.shards[1:])))
    with pytest.raises(UserError, match=r"is outside the file"):
        load_manifest(built.folder)


def test_missing_folder_and_missing_manifest_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; .*dist-pca shards build"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest\.json in it; .*dist-pca shards build"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "\xff\xfe"])
def test_a_manifest_that_is_not_json_is_refused(built: Manifest, content: str) -> None:
    (built.folder / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="not JSON"):
        load_manifest(built.folder)


def test_another_format_is_refused(built: Manifest) -> None:
    _edit(built, format="something else")
    with pytest.raises(UserError, match="not a manifest of dist-pca shards"):
        load_manifest(built.folder)


def test_another_format_version_is_refused(built: Manifest) -> None:
    _edit(built, version=3)
    with pytest.raises(UserError, match="format version 3, but this dist-pca reads versions up to 2"):
        load_manifest(built.folder)


def test_a_field_of_the_wrong_type_is_named(built: Manifest) -> None:
    _edit(built, labelled="perhaps")
    with pytest.raises(UserError, match="labelled"):
        load_manifest(built.folder)


def test_columns_of_unequal_length_are_refused(built: Manifest) -> None:
    shards = json.loads((built.folder / "manifest.json").read_text())["shards"]
    shards[0]["offsets"].pop()
    _edit(built, shards=shards)
    with pytest.raises(UserError, match=r"shard-000000\.tar: columns differ in length from 3 samples"):
        load_manifest(built.folder)


def test_a_shard_outside_the_folder_is_refused(built: Manifest) -> None:
    shards = json.loads((built.folder / "manifest.json").read_text())["shards"]
    shards[0]["name"] = "../raw/classes.yaml"
    _edit(built, shards=shards)
    with pytest.raises(UserError, match="is outside the folder"):
        load_manifest(built.folder)


def test_a_missing_shard_is_named(built: Manifest) -> None:
    (built.folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: listed in manifest\.json but missing"):
        load_manifest(built.folder)


def test_a_truncated_shard_is_named_with_both_sizes(built: Manifest) -> None:
    path = built.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    size = built.shards[0].bytes
    with pytest.raises(UserError, match=rf"shard-000000\.tar: {size - 512} bytes, manifest\.json lists {size}"):
        load_manifest(built.folder)


def _edit(manifest: Manifest, **fields: object) -> None:
    path = manifest.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@few_or_many(100, 3000)
def test_whatever_a_manifest_holds_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "built"
    make_shards(folder, [3, 2])
    whole = json.loads((folder / "manifest.json").read_text())

    @settings(max_examples=examples)
    @given(steps=STEPS, value=NASTY)
    def check(steps: list[int], value: object) -> None:
        (folder / "manifest.json").write_text(json.dumps(replaced(whole, steps, value)))
        check_one_line(lambda: load_manifest(folder), 1000)

    check()


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"", b"\0" * 10])
def test_bytes_that_are_no_manifest_are_refused_in_one_line(built: Manifest, content: bytes) -> None:
    (built.folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="not JSON") as refused:
        load_manifest(built.folder)
    assert "\n" not in str(refused.value)
