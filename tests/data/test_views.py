"""Views depend on the seed and the sample index alone, and are what the papers say."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_pca.config import PhotometricConfig
from dist_pca.data.views import block_mask, class_mask, photometric_view

STRONG = PhotometricConfig(probability=1.0, blur_probability=0.5, grey_probability=0.3)


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 20, 28), dtype=torch.uint8, generator=generator)


def test_a_view_does_not_depend_on_the_other_images_of_its_batch() -> None:
    batch = images(4)
    together = photometric_view(batch, [7, 8, 9, 10], STRONG, seed=3, domain="target")
    alone = [photometric_view(batch[k : k + 1], [7 + k], STRONG, seed=3, domain="target") for k in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_views_differ_by_sample_index_seed_and_domain() -> None:
    one = images(1)
    first = photometric_view(one, [0], STRONG, seed=0, domain="target")
    others = [
        photometric_view(one, [1], STRONG, seed=0, domain="target"),
        photometric_view(one, [0], STRONG, seed=1, domain="target"),
        photometric_view(one, [0], STRONG, seed=0, domain="source"),
    ]
    assert all(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "config",
    [PhotometricConfig(), PhotometricConfig(probability=1.0, domains=("source",))],
)
def test_images_that_nothing_changes_stay_bytes(config: PhotometricConfig) -> None:
    batch = images(2)
    assert photometric_view(batch, [0, 1], config, seed=0, domain="target") is batch


@settings(max_examples=30)
@given(index=st.integers(0, 10**9), seed=st.integers(0, 1000))
@example(index=66787, seed=387)
def test_views_stay_in_the_range_of_colours(index: int, seed: int) -> None:
    view = photometric_view(images(1), [index], STRONG, seed=seed, domain="source")
    assert view.dtype == torch.float32
    assert float(view.min()) >= 0
    assert float(view.max()) <= 1


def test_only_the_stated_share_of_images_is_changed() -> None:
    batch = images(1).expand(400, -1, -1, -1)
    views = photometric_view(batch, range(400), PhotometricConfig(probability=0.25), seed=0, domain="source")
    changed = (views != batch.float() / 255).flatten(1).any(dim=1).float().mean()
    assert 0.18 < float(changed) < 0.32


def test_brightness_moves_within_its_range_and_reaches_both_ends() -> None:
    grey = torch.full((300, 3, 4, 4), 0.5)
    config = PhotometricConfig(probability=1.0, brightness=0.2, contrast=0, saturation=0, hue=0)
    factors = photometric_view(grey, range(300), config, seed=0, domain="source").mean(dim=(1, 2, 3)) / 0.5
    assert 0.8 - 1e-5 <= float(factors.min()) < 0.82
    assert 1.18 < float(factors.max()) <= 1.2 + 1e-5


def test_images_turn_grey_and_are_blurred_independently_of_each_other() -> None:
    stripes = torch.zeros(3, 4, 8)
    stripes[0, :, ::2] = 1
    config = PhotometricConfig(probability=0, grey_probability=0.5, blur_probability=0.5, blur_sigma=(1, 2))
    views = photometric_view(stripes.expand(400, -1, -1, -1), range(400), config, seed=0, domain="source")
    grey = (views[:, :1] == views).flatten(1).all(dim=1)
    blurred = (views[..., 1:] - views[..., :-1]).abs().flatten(1).amax(dim=1) < 0.2
    for first in (grey, ~grey):
        for second in (blurred, ~blurred):
            assert abs(float((first & second).float().mean()) - 0.25) < 0.06


@settings(max_examples=50)
@given(classes=st.integers(1, 9), index=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_half_of_the_classes_are_pasted_whole_rounded_up(classes: int, index: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (1, 12, 12), dtype=torch.uint8, generator=generator)
    label[0, 0, :3] = 255
    mask = class_mask(label, [index], seed=seed)
    present = set(label.unique().tolist()) - {255}
    pasted = set(label[mask].unique().tolist())
    assert len(pasted) == math.ceil(len(present) / 2)
    assert torch.equal(mask, torch.isin(label, torch.tensor(sorted(pasted), dtype=torch.uint8)))


def test_an_image_without_labels_pastes_nothing() -> None:
    assert not class_mask(torch.full((1, 4, 4), 255, dtype=torch.uint8), [0], seed=0).any()


def test_every_class_is_pasted_as_often_as_any_other() -> None:
    label = torch.arange(6, dtype=torch.uint8).repeat(600, 1)[:, None]
    often = class_mask(label, range(600), seed=0).float().mean(dim=(0, 1))
    assert (often - 0.5).abs().max() < 0.08


def test_whole_blocks_are_hidden_at_the_stated_ratio() -> None:
    batch = images(200)
    visible = block_mask(batch, range(200), seed=0, block=8, ratio=0.7)
    assert visible.shape == (200, 1, 20, 28)
    for top in range(0, 20, 8):
        for left in range(0, 28, 8):
            block = visible[:, 0, top : top + 8, left : left + 8].flatten(1)
            assert torch.equal(block.any(dim=1), block.all(dim=1))
    assert abs(float(visible[:, 0, ::8, ::8].float().mean()) - 0.3) < 0.03


def test_hidden_blocks_do_not_depend_on_the_batch() -> None:
    together = block_mask(images(3), [4, 5, 6], seed=1, block=4, ratio=0.5)
    assert torch.equal(together[1:2], block_mask(images(1), [5], seed=1, block=4, ratio=0.5))


def test_each_of_several_bands_is_changed_as_a_grey_image_of_its_own() -> None:
    several = images(2)[:, [0, 1, 2, 0]]
    several[:, 3] //= 2
    whole = photometric_view(several, [0, 1], STRONG, seed=0, domain="source")
    alone = [photometric_view(several[:, k : k + 1], [0, 1], STRONG, seed=0, domain="source") for k in range(4)]
    assert torch.equal(whole, torch.cat(alone, dim=1))
    assert not torch.equal(whole, several / 255)


def test_bands_that_are_no_colours_keep_saturation_hue_and_colour() -> None:
    several = images(1)[:, [0, 1, 2, 0]]
    colours = {"probability": 1.0, "grey_probability": 1.0, "brightness": 0.0, "contrast": 0.0}
    view = photometric_view(several, [0], PhotometricConfig.model_validate(colours), seed=0, domain="source")
    assert torch.allclose(view, several / 255)
