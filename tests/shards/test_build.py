"""Builds as a whole: what they leave, refuse and repeat, and with any number of workers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import describe_empty_classes, load_manifest
from dist_pca.shards.recipe import load_recipe
from tests.support.raw_data import make_folder, save
from tests.support.shards import stored_samples


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=8)
    told: list[tuple[int, int, int]] = []
    alone = build_shards("folder", tmp_path / "raw", tmp_path / "one", workers=1, samples_per_shard=2)
    together = build_shards(
        "folder",
        tmp_path / "raw",
        tmp_path / "two",
        workers=2,
        samples_per_shard=2,
        progress=lambda *numbers: told.append(numbers),
    )
    assert _bytes(alone.folder) == _bytes(together.folder)
    assert told[0] == (0, 8, 0)
    assert told[-1] == (8, 8, sum(sum(shard.lengths) for shard in together.shards))


def _damage_image(raw: Path) -> None:
    path = raw / "images/002.png"
    path.write_bytes(path.read_bytes()[:100])


def _shrink_label(raw: Path) -> None:
    save(Image.new("L", (20, 11)), raw / "labels/002.png")


def _foreign_id(raw: Path) -> None:
    save(Image.new("L", (20, 12), 77), raw / "labels/002.png")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_damage_image, r"images/002\.png: (damaged|unreadable) image"),
        (_shrink_label, r"labels/002\.png: 20 x 11 pixels where its image images/002\.png has 20 x 12"),
        (_foreign_id, r"labels/002\.png: label values outside the recipe's table: 77, 240 pixels"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_unfinished_is_left(
    tmp_path: Path, spoil: Callable[[Path], object], message: str, workers: int
) -> None:
    make_folder(tmp_path / "raw")
    spoil(tmp_path / "raw")
    with pytest.raises(UserError, match=message) as caught:
        build_shards("folder", tmp_path / "raw", tmp_path / "new/out", workers=workers, samples_per_shard=4)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_error_keeps_finished_shards_and_says_so(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    _damage_image(tmp_path / "raw")
    message = r"images/002\.png: .* image .*; finished shards are kept \(1 of 2\), building again resumes from there"
    with pytest.raises(UserError, match=message):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    assert not list((tmp_path / "out").glob(".building/*.part"))


def test_the_same_build_is_not_repeated(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    first = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    before = (tmp_path / "out/shard-000000.tar").stat()
    assert build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1) == first
    assert (tmp_path / "out/shard-000000.tar").stat() == before


def test_another_build_is_refused_without_force(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=1)
    before = _bytes(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another build; .* --force"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert _bytes(tmp_path / "out") == before
    forced = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, force=True)
    assert sorted(_bytes(tmp_path / "out")) == ["manifest.json", "shard-000000.tar"]
    assert load_manifest(tmp_path / "out") == forced


def test_shards_without_a_manifest_are_not_overwritten_without_force(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds shards without a manifest"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert _bytes(tmp_path / "out") == {"shard-000000.tar": b"precious"}


def test_a_forced_build_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    old = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    before = _bytes(tmp_path / "out")
    _damage_image(tmp_path / "raw")
    with pytest.raises(UserError):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, force=True)
    assert _bytes(tmp_path / "out") == before
    assert load_manifest(tmp_path / "out") == old


def test_an_interrupt_leaves_finished_shards_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")

    def interrupt(samples: int, total: int, stored: int) -> None:
        if samples == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=2, progress=interrupt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    assert len(list((tmp_path / "out").glob(".building/shard-*"))) == 2  # a tar and its description


def test_two_builds_do_not_write_to_one_folder_at_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")

    def build_again(samples: int, total: int, stored: int) -> None:
        with pytest.raises(UserError, match="another build is writing there"):
            build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, force=True)

    first = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, progress=build_again)
    assert len(list(stored_samples(load_manifest(first.folder)))) == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: build stopped: .*Not a directory"):
        build_shards("folder", tmp_path / "raw", tmp_path / "file/out", workers=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "raw")
    whole = Path.open

    def full(path: Path, mode: str = "r", *rest, **options):  # type: ignore[no-untyped-def]
        return whole(Path("/dev/full") if mode == "wb" else path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"out: build stopped: .*No space left"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_masks_of_0_and_255_are_a_warning_that_names_the_coding(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=2, classes=2)
    for number in range(2):
        mask = np.zeros((12, 20), np.uint8)
        mask[number:6] = 255
        save(Image.fromarray(mask), tmp_path / f"raw/labels/{number:03d}.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    warning = describe_empty_classes(manifest)
    assert "no label has a pixel of class 1;" in warning
    assert "`ids: {0: class 0, 255: class 1}`" in warning
    recipe = load_recipe("folder")
    coding = recipe.coding.model_copy(update={"ids": {0: "class 0", 255: "class 1"}})
    fixed = build_shards(recipe.model_copy(update={"coding": coding}), tmp_path / "raw", tmp_path / "b", workers=1)
    assert describe_empty_classes(fixed) == ""
    assert fixed.pixel_counts == [240 * 2 - 220, 220]


def test_labels_without_a_pixel_of_any_class_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=2)
    for path in (tmp_path / "raw/labels").iterdir():
        save(Image.new("L", (20, 12), 255), path)
    with pytest.raises(UserError, match=r"out: no label has a pixel of any class, all 2 are ignored"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert not (tmp_path / "out/manifest.json").exists()


def test_what_is_passed_over_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "raw", samples=2)
    (tmp_path / "raw/images/001.heic").touch()
    (tmp_path / "raw/images/gone.png").symlink_to("nowhere.png")
    build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    (message,) = caplog.messages
    assert message.endswith("passed over 1 .heic file (images/001.heic), 1 link to nothing (images/gone.png)")


def test_the_room_does_not_import_torch() -> None:
    modules = "build, inspect, manifest, recipe, pool, writer"
    code = f"import sys; from dist_pca.shards import {modules}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
