"""Views of an image at evaluation: whole or by sliding windows, original or mirrored, at several scales."""

from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from dist_pca.config import EvaluationConfig
from dist_pca.errors import UserError
from dist_pca.evaluation.aggregation import aggregated_logits


def view_logits(
    model: nn.Module, images: torch.Tensor, input_size: tuple[int, int], protocol: EvaluationConfig
) -> list[torch.Tensor]:
    """Logits of each scale and of its mirror image, float32, B x K x h x w, each at its own resolution.

    Args:
        model: A segmenter, in evaluation mode, on the images' device.
        images: RGB in 0..1, B x 3 x H x W.
        input_size: Height and width of the network's input at scale 1; bilinear with antialiasing.
        protocol: Windows, mirror images, scales and aggregation.

    Raises:
        UserError: a window or a whole image is too small for the network.
    """
    views = []
    for scale in protocol.scales:
        size = (max(1, round(input_size[0] * scale)), max(1, round(input_size[1] * scale)))
        pixels = images
        if images.shape[-2:] != size:
            pixels = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        views.append(_window_logits(model, pixels, protocol))
        if protocol.flip:
            views.append(_window_logits(model, pixels.flip(-1), protocol).flip(-1))
    return views


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start offsets of windows along an edge: every `stride` pixels, the last one moved back to end at the edge.

    The windows cover the edge if the stride is not larger than the window; a window longer than the edge starts at 0.
    """
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def _window_logits(model: nn.Module, pixels: torch.Tensor, protocol: EvaluationConfig) -> torch.Tensor:
    """Logits of a resized image: the network's own, or the mean over windows at the image's resolution."""
    edges = (pixels.shape[-2], pixels.shape[-1])
    window = protocol.window or edges
    stride = protocol.stride or (-(-2 * window[0] // 3), -(-2 * window[1] // 3))
    tops, lefts = (window_starts(*along) for along in zip(edges, window, stride, strict=True))
    if len(tops) == len(lefts) == 1:
        return _logits(model, pixels, protocol.aggregation)
    height, width = min(window[0], edges[0]), min(window[1], edges[1])
    total, count = pixels.new_zeros(()), pixels.new_zeros(edges)
    for top, left in product(tops, lefts):
        rows, columns = slice(top, top + height), slice(left, left + width)
        logits = _logits(model, pixels[..., rows, columns], protocol.aggregation)
        if not total.dim():
            total = logits.new_zeros(*logits.shape[:2], *edges)
        total[..., rows, columns] += F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        count[rows, columns] += 1
    return total.div_(count)


def _logits(model: nn.Module, pixels: torch.Tensor, aggregation: float) -> torch.Tensor:
    try:
        logits: torch.Tensor = aggregated_logits(model, pixels, aggregation) if aggregation else model(pixels).logits
    except ValueError as error:  # normalisation layers refuse a single pixel
        raise UserError(
            f"an input of {pixels.shape[-2]} x {pixels.shape[-1]} pixels is too small for the network ({error}); use a "
            "larger window, scale or input size"
        ) from error
    return logits.float()
