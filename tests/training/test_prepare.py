"""What is checked before any process waits for another."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import Shard, load_manifest, save_manifest
from dist_pca.tools.demo.streets import DAY, write_streets
from dist_pca.training.prepare import prepare_run
from dist_pca.training.run_folder import RunData, check_resume, create_run

FIXED_SIZE = ("model.backbone=test_maxvit", "model.weights=scratch", "model.output_stride=null")


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    write_streets(folder / "raw", DAY, split="day", indices=range(2), seed=0, size=(64, 96))
    build_shards("folder", folder / "raw", folder / "day", workers=1)
    return folder


def fixed_size_run(streets: Path, output: Path, *more: str) -> RunConfig:
    shards = (f"data.{part}={streets}/day" for part in ("source", "target", "validation"))
    fixed = ("data.shorter_edge=[64,64]", "data.crop=[64,96]", *FIXED_SIZE)
    return load_config(resource("configs", "demo"), [f"output={output}", *shards, *fixed, *more])


def test_a_run_whose_backbone_was_built_for_the_crop_resumes_as_the_same_run(streets: Path, tmp_path: Path) -> None:
    config = fixed_size_run(streets, tmp_path, "evaluation.input_size=null")
    plan = prepare_run(config, world_size=1, resume=None)
    assert plan.config.model.image_size == (64, 96)
    create_run(plan.config, RunData(plan.classes, plan.sources, plan.targets), world_size=1, start_step=0)
    check_resume(config, None)
    assert prepare_run(config, world_size=1, resume=None).config == plan.config


@pytest.mark.parametrize(
    ("protocol", "shown"),
    [
        (("evaluation.input_size=[96,160]",), "96 x 160"),
        (("evaluation.scales=[1.0,1.5]",), "96 x 144"),
        (("evaluation.window=[64,64]",), "64 x 64"),
        (("evaluation.input_size=[128,192]", "evaluation.window=[64,96]"), None),
        (("evaluation.input_size=[128,192]",), None),
    ],
)
def test_sizes_at_which_validation_would_fail_are_refused_before_training(
    streets: Path, tmp_path: Path, protocol: tuple[str, ...], shown: str | None
) -> None:
    config = fixed_size_run(streets, tmp_path, "evaluation.input_size=null", *protocol)
    if shown is None:
        prepare_run(config, world_size=1, resume=None)
        return
    message = rf"^evaluation\.window: test_maxvit cannot take images of {shown} pixels; set it to .*\[64, 96\], and "
    with pytest.raises(UserError, match=message):
        prepare_run(config, world_size=1, resume=None)


def with_bands(streets: Path, folder: Path, bands: int) -> Path:
    """A copy of the shards that says it has other bands."""
    shutil.copytree(streets / "day", folder)
    save_manifest(replace(load_manifest(folder), bands=bands))
    return folder


def test_the_network_takes_the_bands_of_the_shards_and_the_run_resumes_as_the_same(
    streets: Path, tmp_path: Path
) -> None:
    folder = with_bands(streets, tmp_path / "four", 4)
    shards = [f"data.{part}={folder}" for part in ("source", "target", "validation")]
    config = fixed_size_run(streets, tmp_path, "model.backbone=test_resnet", "evaluation.input_size=null", *shards)
    plan = prepare_run(config, world_size=1, resume=None)
    assert (plan.config.model.bands, plan.model.backbone.options.bands) == (4, 4)
    create_run(plan.config, RunData(plan.classes, plan.sources, plan.targets), world_size=1, start_step=0)
    check_resume(config, None)
    assert prepare_run(config, world_size=1, resume=None).config == plan.config
    with pytest.raises(UserError, match=r"^model\.bands: 3, and the images of .*/four have 4 bands; leave the key out"):
        prepare_run(fixed_size_run(streets, tmp_path / "other", "model.bands=3", *shards), world_size=1, resume=None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("target", r"^shards .*/five: images of 5 bands, and those of .*/day have 3; build both with the same `bands`"),
        ("validation", r"^data\.validation: images of .*/five have 5 bands, and those of the source 3; build both "),
    ],
)
def test_shards_of_unlike_bands_are_refused_with_both(streets: Path, tmp_path: Path, key: str, message: str) -> None:
    folder = with_bands(streets, tmp_path / "five", 5)
    with pytest.raises(UserError, match=message):
        prepare_run(fixed_size_run(streets, tmp_path, f"data.{key}={folder}"), world_size=1, resume=None)


def unlabelled(shard: Shard) -> Shard:
    return replace(shard, pixel_counts=[])


def ignored(shard: Shard) -> Shard:
    return replace(shard, pixel_counts=[[0] * len(counts) for counts in shard.pixel_counts])


def tall(shard: Shard) -> Shard:
    return replace(shard, heights=[96] * len(shard.keys), widths=[64] * len(shard.keys))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("validation", unlabelled, r"^data\.validation: .*/changed has no labels to score against; "),
        ("source", ignored, r"^shards .*/changed: no label has a pixel of any class, all 2 are ignored; "),
        ("source", tall, r"^data\.crop: 64 x 96 does not fit into .*/changed: image .* \(96 x 64\) measures 96 x 64 "),
        ("target", tall, r"^data\.crop: 64 x 96 does not fit into .*/changed: image .* \(96 x 64\) measures 96 x 64 "),
    ],
)
def test_shards_that_the_run_cannot_use_are_refused_before_training(
    streets: Path, tmp_path: Path, key: str, change: Callable[[Shard], Shard], message: str
) -> None:
    shutil.copytree(streets / "day", tmp_path / "changed")
    manifest = load_manifest(tmp_path / "changed")
    shards = tuple(map(change, manifest.shards))
    save_manifest(replace(manifest, labelled=all(shard.pixel_counts for shard in shards), shards=shards))
    config = fixed_size_run(streets, tmp_path, f"data.{key}={tmp_path}/changed")
    with pytest.raises(UserError, match=message):
        prepare_run(config, world_size=1, resume=None)
