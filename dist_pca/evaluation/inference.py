"""Inference: from images to label maps."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dist_pca.config import EvaluationConfig, RunConfig
from dist_pca.errors import UserError
from dist_pca.evaluation.views import LogitRows, open_views

BAND_ELEMENTS = 2**24
"""Number of logits that are upsampled at once; for large images all of them would not fit into memory."""
_LONGEST_ASPECT = 16
"""Largest aspect ratio; more elongated images are resized to the area of an image with this ratio."""


@torch.no_grad()
def predict(
    model: nn.Module,
    images: torch.Tensor,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    protocol: EvaluationConfig | None = None,
) -> torch.Tensor:
    """Predict labels: resize images, run the network, upsample its logits and take the argmax.

    With several views of an image (scales, mirror images), the argmax of the mean probability is taken.

    Args:
        model: A segmenter, in evaluation mode, on the images' device.
        images: uint8, B x bands x H x W; with windows they may be on the CPU, and memory beyond theirs is bounded.
        input_size: Height and width of the network's input; bilinear with antialiasing.
        output_size: Height and width of the result; bilinear, corners not aligned.
        protocol: Windows, mirror images, scales and aggregation; None has none of them.

    Returns:
        Train ids, uint8, B x height x width.

    Raises:
        UserError: the accelerator runs out of memory, or the input is too small for the network.
    """
    try:
        views = open_views(model, images, input_size, protocol or EvaluationConfig())
        return torch.cat([band.to(images.device) for band in _label_bands(views, output_size)], dim=1)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"an image of {input_size[0]} x {input_size[1]} pixels does not fit into the memory of {images.device}; "
            "use smaller windows with --window or evaluation.window"
        ) from error


def proportional_input_size(config: RunConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width of the network's input for an image of any aspect ratio, which is kept.

    The shorter edge is that of evaluation.input_size, or the mean of data.shorter_edge. Very elongated images are
    resized to the area of a 16 : 1 image with that edge.
    """
    edge = min(config.evaluation.input_size or (sum(config.data.shorter_edge) / 2,))
    scale = min(edge / min(height, width), edge * (_LONGEST_ASPECT / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _label_bands(views: Sequence[LogitRows], output_size: tuple[int, int]) -> Iterator[torch.Tensor]:
    batch, classes = views[0].rows(0, 1).shape[:2]
    height, width = output_size
    rows = max(1, BAND_ELEMENTS // (batch * classes * width))
    for top in range(0, height, rows):
        bands = (_upsampled_rows(view, top, min(top + rows, height), output_size) for view in views)
        scores = next(bands) if len(views) == 1 else sum(band.softmax(dim=1) for band in bands)
        assert isinstance(scores, torch.Tensor)
        yield scores.argmax(dim=1).to(torch.uint8)


def _upsampled_rows(view: LogitRows, top: int, bottom: int, output_size: tuple[int, int]) -> torch.Tensor:
    """Rows `top` to `bottom` of bilinear upsampling with corners not aligned, B x K x rows x width."""
    height, width = output_size
    # Row coordinates are fp64: in fp32 the rows of a band would differ slightly from those of the whole map.
    place = (torch.arange(top, bottom, dtype=torch.float64) + 0.5) * (view.height / height) - 0.5
    place = place.clamp(min=0, max=view.height - 1)
    above = place.floor().long()
    below = (above + 1).clamp(max=view.height - 1)
    first = int(above[0])
    logits = view.rows(first, int(below[-1]) + 1)
    share = (place - above).to(logits)[:, None]
    above, below = (above - first).to(logits.device), (below - first).to(logits.device)
    rows = torch.lerp(logits[:, :, above], logits[:, :, below], share)
    return F.interpolate(rows, (bottom - top, width), mode="bilinear", align_corners=False)
