import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dist_pca.errors import UserError
from dist_pca.files import file_sha256
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import Manifest, load_manifest, save_manifest
from dist_pca.shards.verify import Problem, verify
from dist_pca.shards.walk import walk
from tests.support.raw_data import make_folder


@pytest.fixture
def built(tmp_path: Path) -> Manifest:
    make_folder(tmp_path / "raw", samples=6)
    return build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=2)


def problems(manifest: Manifest, *, deep: bool = False) -> list[Problem]:
    return verify(manifest.folder, deep=deep, workers=1).problems


def edit(manifest: Manifest, number: int, **columns: Any) -> None:
    """Change what the manifest says of a shard."""
    shards = list(manifest.shards)
    shards[number] = replace(shards[number], **columns)
    save_manifest(replace(manifest, shards=tuple(shards)))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_folder_has_no_problem_and_is_counted(built: Manifest, deep: bool) -> None:
    told: list[tuple[int, int, int]] = []
    found = verify(built.folder, deep=deep, workers=1, progress=lambda *numbers: told.append(numbers))
    assert found.problems == []
    assert (found.shards, found.samples, found.bytes) == (3, 6, sum(shard.bytes for shard in built.shards))
    assert told[-1] == (6 * (1 + deep), 6 * (1 + deep), found.bytes)


def test_all_problems_are_listed_and_not_only_the_first(built: Manifest) -> None:
    flip(built.folder / "shard-000000.tar", 700)
    (built.folder / "shard-000001.tar").unlink()
    with (built.folder / "shard-000002.tar").open("ab") as file:
        file.write(b"more")
    (built.folder / "shard-000003.tar").touch()
    found = problems(built)
    assert [(problem.file, problem.problem.partition(" (")[0]) for problem in found] == [
        ("shard-000000.tar", "SHA-256 differs from manifest.json"),
        ("shard-000001.tar", "listed in manifest.json but missing"),
        ("shard-000002.tar", f"{built.shards[2].bytes + 4} bytes where manifest.json lists {built.shards[2].bytes}"),
        ("shard-000002.tar", found[3].problem),
        ("shard-000003.tar", "not listed in manifest.json"),
    ]


def test_keys_twice_in_the_folder_are_a_problem(built: Manifest) -> None:
    edit(built, 2, keys=[built.shards[0].keys[1], built.shards[2].keys[1]])
    assert Problem("shard-000002.tar", built.shards[0].keys[1], "the key is in shard-000000.tar too") in problems(built)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (lambda shard: {"keys": shard.keys[::-1]}, "the sample at its index is 'images_000'"),
        (lambda shard: {"offsets": [512, shard.offsets[1]]}, r"is at bytes 0 to \d+, manifest.json lists bytes 512"),
        (
            lambda shard: {
                name: getattr(shard, name)[:1]
                for name in ("keys", "offsets", "lengths", "heights", "widths", "pixel_counts")
            },
            "2 samples where manifest.json lists 1",
        ),
    ],
)
def test_places_that_are_not_the_tars_are_a_problem(
    built: Manifest, columns: Callable[[Any], dict[str, Any]], message: str
) -> None:
    edit(built, 0, **columns(built.shards[0]))
    assert any(re.match(message, problem.problem) for problem in problems(built))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"heights": [13, 12]}, "png: 20 x 12 pixels where manifest.json lists 20 x 13"),
        ({"widths": [20, 21]}, "label.png: 20 x 12 pixels where the image has 21 x 12"),
        ({"pixel_counts": [[60, 60, 60], [61, 60, 59]]}, "label.png: pixel counts of class 0, class 2 differ from"),
    ],
)
def test_deep_finds_sizes_and_counts_that_the_pixels_deny(
    built: Manifest, columns: dict[str, Any], message: str
) -> None:
    edit(built, 1, **columns)
    assert problems(built) == []
    assert any(problem.problem.startswith(message) for problem in problems(built, deep=True))


def test_deep_finds_values_outside_the_class_table(built: Manifest) -> None:
    shards = tuple(replace(shard, pixel_counts=[row[:2] for row in shard.pixel_counts]) for shard in built.shards)
    save_manifest(replace(built, classes=built.classes[:2], shards=shards))
    found = problems(built, deep=True)
    assert len(found) == 6
    assert {problem.problem for problem in found} == {"label.png: label values outside the 2 classes: 2, 60 pixels"}


def test_deep_finds_damage_that_a_wrong_checksum_hides(built: Manifest) -> None:
    path = built.folder / "shard-000001.tar"
    flip(path, walk(path)[0].members["png"][0] + 41)  # where the compressed pixels begin
    edit(built, 1, sha256=file_sha256(path))
    assert problems(built) == []
    (found,) = problems(built, deep=True)
    assert (found.file, found.key) == ("shard-000001.tar", "images_002")
    assert "image" in found.problem


def test_deep_names_every_sample_of_a_shard_that_was_cut(built: Manifest) -> None:
    path = built.folder / "shard-000001.tar"
    os.truncate(path, built.shards[1].offsets[1] + 700)
    found = problems(built, deep=True)
    assert found[-1] == Problem("shard-000001.tar", built.shards[1].keys[1], "the shard ends inside it")
    assert len(found) == 3


def test_a_manifest_that_cannot_be_read_is_a_problem(built: Manifest) -> None:
    (built.folder / "manifest.json").write_text("{")
    (found,) = problems(built)
    assert found.file == "manifest.json"
    assert found.problem.startswith("not JSON")


def test_what_is_no_shard_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        verify(tmp_path)


@pytest.mark.slow
def test_all_cores_find_the_same(built: Manifest) -> None:
    flip(built.folder / "shard-000000.tar", 700)
    (built.folder / "shard-000001.tar").write_bytes(b"")
    alone, together = (verify(built.folder, deep=True, workers=workers) for workers in (1, 2))
    assert alone == together
    assert len(alone.problems) >= 3
    assert json.dumps(asdict(alone))
    assert load_manifest(built.folder, check_files=False) == built
