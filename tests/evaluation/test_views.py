from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dist_pca.config import EvaluationConfig
from dist_pca.evaluation import views
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.views import image_pixels, open_views, view_logits, window_starts
from tests.support.networks import segmenter

NETWORK = segmenter()
edges = st.integers(9, 40)


def protocol(**keys: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate(keys)


def images(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)


class LogitsOnly(NamedTuple):
    logits: torch.Tensor


class PixelWise(nn.Module):
    """A network that sees no further than a pixel, so that windows can make no difference; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def forward(self, pixels: torch.Tensor) -> LogitsOnly:
        self.seen.append((pixels.shape[-2], pixels.shape[-1]))
        return LogitsOnly(pixels)


class Surroundings(nn.Module):
    """A small network whose coarse logits depend on neighbours, on the whole of its input, and on left and right."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(3, 3, 5, 5, generator=generator) / 75

    def forward(self, pixels: torch.Tensor) -> LogitsOnly:
        return LogitsOnly(F.conv2d(pixels, self.kernel, stride=2, padding=2) + pixels.mean(dim=(2, 3), keepdim=True))


@given(length=st.integers(1, 300), window=st.integers(1, 300), data=st.data())
def test_windows_cover_an_edge_and_stay_on_it(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    covered = {pixel for start in starts for pixel in range(start, start + min(window, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts))
    assert len(starts) == 1 + -(-max(0, length - window) // stride)


@settings(max_examples=20)
@given(height=edges, width=edges, more=st.tuples(st.integers(0, 50), st.integers(0, 50)))
def test_a_window_over_everything_is_the_whole_image(height: int, width: int, more: tuple[int, int]) -> None:
    pixels = images(height, width).float() / 255
    window = (height + more[0], width + more[1])
    (whole,) = view_logits(Surroundings(), pixels, (height, width), protocol())
    (windowed,) = view_logits(Surroundings(), pixels, (height, width), protocol(window=window))
    torch.testing.assert_close(windowed, whole, rtol=0, atol=0)


@settings(max_examples=30)
@given(height=edges, width=edges, window=st.tuples(st.integers(4, 90), st.integers(4, 90)), data=st.data())
def test_where_surroundings_do_not_matter_windows_change_nothing(
    height: int, width: int, window: tuple[int, int], data: st.DataObject
) -> None:
    stride = [data.draw(st.integers(max(1, edge // 3), edge)) for edge in window]
    pixels = images(height, width).float() / 255
    model = PixelWise()
    (logits,) = view_logits(model, pixels, (height, width), protocol(window=window, stride=stride))
    torch.testing.assert_close(logits, pixels)
    assert set(model.seen) == {(min(window[0], height), min(window[1], width))}


def test_logits_are_averaged_where_windows_overlap() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, pixels: torch.Tensor) -> LogitsOnly:
            self.calls += 1
            return LogitsOnly(torch.full_like(pixels, float(self.calls)))

    (logits,) = view_logits(Counting(), torch.zeros(1, 3, 4, 6), (4, 6), protocol(window=(4, 4), stride=(4, 2)))
    assert logits[0, 0, 0].tolist() == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]


@settings(max_examples=30)
@given(edges, st.integers(5, 30), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=4))
def test_rows_that_are_asked_for_downwards_are_those_of_the_whole_view(
    height: int, window: int, steps: list[tuple[int, int]]
) -> None:
    how = protocol(window=(window, 13), flip=True)
    pixels = images(height, 20)
    whole = view_logits(Surroundings(), pixels, (height, 20), how)
    opened = open_views(Surroundings(), pixels, (height, 20), how)
    for view, expected in zip(opened, whole, strict=True):
        assert view.height == expected.shape[-2]
        bottom = 0
        for more, again in cycle(steps):
            top, bottom = max(0, bottom - again), min(bottom + more, height)
            assert torch.equal(view.rows(top, bottom), expected[..., top:bottom, :])
            if bottom == height:
                break


@pytest.mark.parametrize("stride", [20, 13, 7])
def test_rows_may_be_asked_for_in_bands_with_gaps_between_them(stride: int) -> None:
    how, pixels = protocol(window=(20, 20), stride=(stride, 20)), images(90, 20)
    (whole,) = view_logits(Surroundings(), pixels, (90, 20), how)
    for gap in range(1, 25):
        (view,) = open_views(Surroundings(), pixels, (90, 20), how)
        for top in range(0, 89, gap + 2):
            assert torch.equal(view.rows(top, top + 2), whole[..., top : top + 2, :])


def test_an_image_too_large_to_be_resized_on_a_device_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    assert image_pixels(image, "meta").device.type == "meta"
    monkeypatch.setattr(views, "MAX_WHOLE", image.size - 1)
    assert image_pixels(image, "meta").device.type == "cpu"
    assert image_pixels(image, "meta").shape == (1, 3, 4, 6)


def test_the_network_runs_no_further_down_than_rows_are_asked_for() -> None:
    model = PixelWise()
    (view,) = open_views(model, images(4000, 60), (4000, 60), protocol(window=(40, 60), stride=(40, 60)))
    assert model.seen == []
    view.rows(0, 40)
    assert model.seen == [(40, 60)]
    view.rows(30, 41)
    assert len(model.seen) == 2


def test_pixels_of_eight_bits_are_resized_and_cut_like_others() -> None:
    for size in ((48, 64), (40, 50)):
        for how in (protocol(), protocol(window=(33, 33)), protocol(scales=(0.9,), flip=True)):
            with torch.no_grad():
                in_bytes = view_logits(NETWORK, images(48, 64), size, how)
                in_unit = view_logits(NETWORK, images(48, 64).float() / 255, size, how)
            torch.testing.assert_close(in_bytes, in_unit, rtol=0, atol=0)


def test_the_largest_images_are_resized_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = view_logits(PixelWise(), images(48, 64), (30, 40), protocol(window=(20, 20)))
    monkeypatch.setattr(views, "MAX_WHOLE", 0)
    found = view_logits(PixelWise(), images(48, 64), (30, 40), protocol(window=(20, 20)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)
    assert not torch.equal(found[0], expected[0])


@settings(max_examples=15)
@given(height=edges, width=edges, window=st.sampled_from([None, (16, 16)]), scales=st.sampled_from([(1,), (0.75, 1.5)]))
def test_with_flip_a_mirrored_image_gets_the_mirrored_logits(
    height: int, width: int, window: tuple[int, int] | None, scales: tuple[float, ...]
) -> None:
    how = protocol(flip=True, window=window, scales=scales)
    pixels = images(height, width).float() / 255
    first = view_logits(Surroundings(), pixels, (height, width), how)
    second = view_logits(Surroundings(), pixels.flip(-1), (height, width), how)
    assert len(first) == 2 * len(scales)
    mirrored = [view.flip(-1) for pair in zip(second[1::2], second[::2], strict=True) for view in pair]
    torch.testing.assert_close(first, mirrored, rtol=1e-3, atol=1e-3)


def test_one_scale_is_another_input_size() -> None:
    scaled = predict(NETWORK, images(64, 96), (64, 96), (64, 96), protocol(scales=(0.5,)))
    assert torch.equal(scaled, predict(NETWORK, images(64, 96), (32, 48), (64, 96)))


def test_several_views_give_the_class_of_the_largest_mean_probability() -> None:
    class BySize(nn.Module):
        """Sure of class 0 at full size, a little for class 1 at half of it."""

        def forward(self, pixels: torch.Tensor) -> LogitsOnly:
            score = 3.0 if pixels.shape[-1] == 16 else -1.0
            return LogitsOnly(torch.stack([torch.full_like(pixels[:, 0], score), torch.zeros_like(pixels[:, 0])], 1))

    label = predict(BySize(), images(16, 16), (16, 16), (16, 16), protocol(scales=(1, 0.5)))
    assert not label.any()
    # 0.95 + 0.27 + 0.27 is less than half of three.
    label = predict(BySize(), images(16, 16), (16, 16), (16, 16), protocol(scales=(1, 0.5, 0.5)))
    assert label.all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stride": (8, 8)}, "without a window"),
        ({"window": (8, 8), "stride": (8, 9)}, r"\[8, 9\] leaves gaps between windows of \[8, 8\]"),
        ({"scales": ()}, "at least 1 item"),
        ({"scales": (0.0,)}, "greater than 0"),
        ({"aggregation": 1.5}, "less than or equal to 1"),
    ],
)
def test_protocols_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(**keys)
