"""Views of an image at evaluation: whole or by sliding windows, original or mirrored, at several scales."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from dist_pca.config import EvaluationConfig
from dist_pca.errors import UserError
from dist_pca.evaluation.aggregation import aggregated_logits

MAX_WHOLE = 2**29
"""Bytes of an 8-bit image up to which it is resized in floating point."""


class LogitRows(Protocol):
    """Logits of one view of an image, of which a few rows are available at a time."""

    height: int
    """Number of rows."""

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Logits of some rows, float32, B x K x rows x w; `top` never decreases from call to call."""


def view_logits(
    model: nn.Module, images: torch.Tensor, input_size: tuple[int, int], protocol: EvaluationConfig
) -> list[torch.Tensor]:
    """Logits of each scale and of its mirror image, float32, B x K x h x w, each at its own resolution.

    The arguments and errors are those of `open_views`.
    """
    return [view.rows(0, view.height) for view in open_views(model, images, input_size, protocol)]


def open_views(
    model: nn.Module, images: torch.Tensor, input_size: tuple[int, int], protocol: EvaluationConfig
) -> list[LogitRows]:
    """Prepare the logits of each scale and of its mirror image, each at its own resolution.

    With windows, the network runs when their rows are asked for, and memory is that of one row of windows.

    Args:
        model: A segmenter, in evaluation mode.
        images: uint8 or floating point in 0..1, B x bands x H x W, on the model's device or the CPU.
        input_size: Height and width of the network's input at scale 1; bilinear with antialiasing. Images of more than
            half a gigabyte are resized in 8 bits.
        protocol: Windows, mirror images, scales and aggregation.

    Raises:
        UserError: a window or a whole image is too small for the network.
    """
    views: list[LogitRows] = []
    for scale in protocol.scales:
        size = (max(1, round(input_size[0] * scale)), max(1, round(input_size[1] * scale)))
        pixels = images
        if images.shape[-2:] != size:
            given = images if images.numel() > MAX_WHOLE else _unit(images)
            pixels = F.interpolate(given, size, mode="bilinear", align_corners=False, antialias=True)
        views.append(_open_view(model, pixels, protocol))
        if protocol.flip:
            views.append(_Mirrored(_open_view(model, pixels.flip(-1), protocol)))
    return views


def image_pixels(image: npt.NDArray[np.uint8], device: torch.device | str) -> torch.Tensor:
    """An image H x W x bands as 1 x bands x H x W, on a device unless it is too large to be resized there."""
    # Of a larger image only the resized one, or its windows, are moved.
    return torch.from_numpy(image).to("cpu" if image.size > MAX_WHOLE else device).permute(2, 0, 1)[None]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start offsets of windows along an edge: every `stride` pixels, the last one moved back to end at the edge.

    The windows cover the edge if the stride is not larger than the window; a window longer than the edge starts at 0.
    """
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def _open_view(model: nn.Module, pixels: torch.Tensor, protocol: EvaluationConfig) -> LogitRows:
    edges = (pixels.shape[-2], pixels.shape[-1])
    window = protocol.window or edges
    stride = protocol.stride or (-(-2 * window[0] // 3), -(-2 * window[1] // 3))
    tops, lefts = (window_starts(*along) for along in zip(edges, window, stride, strict=True))
    if len(tops) == len(lefts) == 1:
        return _Whole(_logits(model, pixels, protocol.aggregation))
    size = (min(window[0], edges[0]), min(window[1], edges[1]))
    return _Windowed(lambda region: _logits(model, region, protocol.aggregation), pixels, tops, lefts, size)


class _Whole:
    """The network's own logits of a whole image."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits, self.height = logits, logits.shape[-2]

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self._logits[..., top:bottom, :]


class _Mirrored:
    """The mirror image of a view."""

    def __init__(self, view: LogitRows) -> None:
        self._view, self.height = view, view.height

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self._view.rows(top, bottom).flip(-1)


class _Windowed:
    """The mean over overlapping windows, at the image's resolution; the network runs window by window, downwards."""

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        pixels: torch.Tensor,
        tops: Sequence[int],
        lefts: Sequence[int],
        size: tuple[int, int],
    ) -> None:
        self._network, self._pixels, self._tops, self._lefts, self._size = network, pixels, tops, lefts, size
        self.height, self._width = pixels.shape[-2], pixels.shape[-1]
        self._done = 0
        self._top = 0
        """Row at which `_total` and `_count` begin."""
        self._total, self._count = torch.zeros(0), torch.zeros(0)

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        while self._done < len(self._tops) and self._tops[self._done] < bottom:
            # Where rows are asked for in bands, none may have been asked for between the last windows and these.
            self._add(self._tops[self._done], keep=min(top, self._tops[self._done]))
            self._done += 1
        rows = slice(top - self._top, bottom - self._top)
        return self._total[..., rows, :] / self._count[rows]

    def _add(self, top: int, keep: int) -> None:
        """Add a row of windows, and drop the rows above `keep`."""
        height, width = self._size
        for number, left in enumerate(self._lefts):
            logits = self._network(self._pixels[..., top : top + height, left : left + width])
            if not number:
                self._resize(logits, keep, top + height)
            region = (..., slice(top - self._top, top - self._top + height), slice(left, left + width))
            self._total[region] += F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
            self._count[region] += 1

    def _resize(self, logits: torch.Tensor, top: int, bottom: int) -> None:
        """Let the sums begin at one row and end at another, 0 where they are new."""
        total = logits.new_zeros(*logits.shape[:2], bottom - top, self._width)
        count = logits.new_zeros(bottom - top, self._width)
        if self._done:
            kept = self._total[..., top - self._top :, :]
            total[..., : kept.shape[-2], :] = kept
            count[: kept.shape[-2]] = self._count[top - self._top :]
        self._total, self._count, self._top = total, count, top


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    # In place, because of a large image another copy may not fit into memory.
    return pixels if pixels.is_floating_point() else pixels.float().div_(255)


def _logits(model: nn.Module, pixels: torch.Tensor, aggregation: float) -> torch.Tensor:
    device = next((parameter.device for parameter in model.parameters()), pixels.device)
    pixels = _unit(pixels.to(device))
    try:
        logits: torch.Tensor = aggregated_logits(model, pixels, aggregation) if aggregation else model(pixels).logits
    except ValueError as error:  # normalisation layers refuse a single pixel
        raise UserError(
            f"an input of {pixels.shape[-2]} x {pixels.shape[-1]} pixels is too small for the network ({error}); use a "
            "larger window, scale or input size"
        ) from error
    return logits.float()
