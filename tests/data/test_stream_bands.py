"""Images of other than three bands, from raw files to batches."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dist_pca.data.decode import decode_sample
from dist_pca.data.stream import evaluation_stream, stream
from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.images import Encoding, Reading, encode_image, open_image
from dist_pca.shards.manifest import save_manifest
from tests.support.raw_data import make_band_folder
from tests.support.shards import CLASSES, data_config, make_shards

ONE_RANK = {"seed": 0, "rank": 0, "world_size": 1, "accumulation": 1, "start_step": 0}


def test_twelve_bits_of_five_bands_become_a_batch_in_the_recipes_range(tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="tifffile is in the extra `bands`")
    values = make_band_folder(tmp_path / "raw", 5, dtype=np.uint16)
    manifest = build_shards(tmp_path / "raw/recipe.yaml", tmp_path / "raw", tmp_path / "out", workers=1)
    expected = [np.rint(array / 4095 * 255).astype(np.uint8) for array in values]
    config = data_config(shorter_edge=(12, 12), crop=(12, 20), flip=0.0)
    with closing(stream(config, [manifest], "source", global_batch=4, **ONE_RANK)) as batches:  # type: ignore[arg-type]
        batch = next(batches)
    assert batch.images.shape == (4, 5, 12, 20)
    for key, image in zip(batch.keys, batch.images, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected[int(key.rpartition("_")[2])])
    samples = list(evaluation_stream(manifest, 0, 1, classes=manifest.classes, bands=5, workers=0))
    assert [np.array_equal(sample.image, array) for sample, array in zip(samples, expected, strict=True)] == [True] * 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    pixels=st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 4])).flatmap(
        lambda shape: arrays(np.uint8, shape)
    )
)
def test_two_or_four_bands_are_decoded_as_the_file_has_them(tmp_path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    np.save(tmp_path / "a.npy", pixels)
    height, width, bands = pixels.shape
    reading = Reading(bands=tuple(range(1, bands + 1)), exact=True)
    member, content = encode_image(tmp_path / "a.npy", open_image(tmp_path / "a.npy", reading), Encoding())
    described = {
        "__key__": "a",
        "__url__": "shard",
        "__size__": (height, width),
        "__bands__": bands,
        "__image__": member,
    }
    image, _ = decode_sample({**described, member: content}, label_member=None)
    assert np.array_equal(np.asarray(image), pixels)


def test_folders_of_unlike_bands_are_refused_with_both(tmp_path: Path) -> None:
    rgb, other = make_shards(tmp_path / "rgb", [4]), replace(make_shards(tmp_path / "other", [4]), bands=4)
    message = r"^shards .*other: images of 4 bands, and those of .*rgb have 3; build both with the same `bands`"
    with pytest.raises(UserError, match=message):
        stream(data_config(), [rgb], "source", global_batch=4, targets=[other], **ONE_RANK)


def test_shards_of_other_bands_than_the_networks_are_not_evaluated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^shards .*rgb: images of 3 bands, and the network takes 5; name shards of 5"):
        evaluation_stream(make_shards(tmp_path / "rgb", [1]), 0, 1, classes=CLASSES, bands=5)


def test_an_image_of_other_bands_than_the_manifests_is_corrupt(tmp_path: Path) -> None:
    manifest = replace(make_shards(tmp_path / "four", [1]), bands=4)
    save_manifest(manifest)
    samples = evaluation_stream(manifest, 0, 1, classes=CLASSES, bands=4, workers=0)
    with pytest.raises(UserError, match=r"sample '000-000': png: 3 bands where the manifest lists 4; build the shards"):
        next(samples)
