from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_pca.config import RunConfig
from dist_pca.errors import UserError
from dist_pca.evaluation import inference
from dist_pca.evaluation.inference import predict, proportional_input_size


class LogitsOnly(NamedTuple):
    logits: torch.Tensor


class Brightness(nn.Module):
    """Two classes, dark and bright, at a quarter of the resolution; remembers what it saw."""

    def forward(self, images: torch.Tensor) -> LogitsOnly:
        self.seen = images
        small = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        return LogitsOnly(torch.cat([0.5 - small, small - 0.5], 1))


def run(shorter_edge: tuple[int, int], size: tuple[int, int] | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "data": {"source": "s", "target": "t", "shorter_edge": shorter_edge, "crop": (8, 8)},
            "model": {"backbone": "test_resnet"},
            "training": {"steps": 1},
            "evaluation": {"input_size": size},
        }
    )


def test_a_prediction_has_the_output_size_and_the_class_of_the_largest_logit() -> None:
    images = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    images[0, :, :, 24:] = 255
    labels = predict(Brightness(), images, (32, 48), (64, 96))
    assert labels.dtype == torch.uint8
    assert labels.shape == (2, 64, 96)
    assert (labels[0, :, 48:] == 1).all()
    assert not labels[0, :, :48].any()
    assert not labels[1].any()


def test_the_network_sees_the_input_size_in_fractions_with_antialiasing() -> None:
    model = Brightness()
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    predict(model, stripes, (16, 16), (16, 16))
    assert model.seen.shape == (1, 3, 16, 16)
    torch.testing.assert_close(model.seen[..., 2:-2], torch.full((1, 3, 16, 12), 0.5))


def test_images_of_the_input_size_reach_the_network_unchanged() -> None:
    model = Brightness()
    images = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8)
    predict(model, images, (16, 24), (16, 24))
    torch.testing.assert_close(model.seen * 255, images.float())


def test_logits_are_upsampled_before_the_largest_is_taken() -> None:
    # From +3 to -1 the score crosses zero three quarters of the way; labels upsampled as such would change halfway.
    class TwoPositions(nn.Module):
        def forward(self, images: torch.Tensor) -> LogitsOnly:
            score = torch.tensor([3.0, -1.0]).view(1, 1, 1, 2)
            return LogitsOnly(torch.cat([torch.zeros_like(score), score], 1))

    labels = predict(TwoPositions(), torch.zeros(1, 3, 8, 16, dtype=torch.uint8), (8, 16), (8, 16))
    assert labels[0, 0].tolist() == [1] * 10 + [0] * 6


def test_prediction_keeps_no_graph() -> None:
    model = nn.Sequential(Brightness())
    assert not predict(model[0], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (8, 8), (8, 8)).requires_grad


def test_the_configured_input_size_wins() -> None:
    assert run((20, 30), (730, 1460)).input_size(1024, 2048) == (730, 1460)


@given(st.integers(16, 4000), st.integers(16, 4000))
def test_without_one_the_shorter_edge_gets_the_middle_of_its_range_and_the_aspect_ratio_stays(
    height: int, width: int
) -> None:
    size = run((20, 30)).input_size(height, width)
    assert min(size) == 25
    assert max(size) == pytest.approx(25 * max(height, width) / min(height, width), abs=0.51)


@pytest.mark.parametrize(("image", "resized"), [((100, 1600), (25, 400)), ((40, 4000), (10, 1000))])
def test_an_image_longer_than_16_to_1_gets_the_area_of_one_that_is_not(
    image: tuple[int, int], resized: tuple[int, int]
) -> None:
    assert proportional_input_size(run((20, 30)), *image) == resized


@pytest.mark.parametrize("band", [1, 40, 200, 1000])
def test_labels_made_in_bands_are_those_of_whole_maps(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Random(nn.Module):
        def forward(self, images: torch.Tensor) -> LogitsOnly:
            return LogitsOnly(torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0)))

    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    whole = nn.functional.interpolate(Random()(images).logits, (37, 41), mode="bilinear", align_corners=False)
    monkeypatch.setattr(inference, "BAND_ELEMENTS", band * 5 * 41)
    assert torch.equal(predict(Random(), images, (8, 8), (37, 41)), whole.argmax(1).to(torch.uint8))


def test_memory_that_does_not_suffice_is_an_error_with_a_remedy() -> None:
    class Hungry(nn.Module):
        def forward(self, images: torch.Tensor) -> LogitsOnly:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"8 x 12 pixels does not fit into the memory of cpu; .*evaluation\.window"):
        predict(Hungry(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (8, 12), (8, 8))


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_images_of_any_proportions_keep_them(height: int, width: int) -> None:
    seen = proportional_input_size(run((20, 30), (40, 90)), height, width)
    assert min(seen) >= 1
    # Rounding may add a fifth to an edge of three pixels.
    assert seen[0] * seen[1] <= 1.2 * 16 * 40**2
    if max(height, width) <= 16 * min(height, width):
        assert min(seen) == 40
        assert max(seen) == pytest.approx(40 * max(height, width) / min(height, width), abs=0.51)
