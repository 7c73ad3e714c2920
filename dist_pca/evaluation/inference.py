"""From images to label maps."""

import torch
from torch import nn
from torch.nn import functional as F

from dist_pca.config import RunConfig


@torch.no_grad()
def predict(
    model: nn.Module, images: torch.Tensor, input_size: tuple[int, int], output_size: tuple[int, int]
) -> torch.Tensor:
    """Label images: resize them, run the network, upsample its logits and take the largest.

    Args:
        model: A segmenter, in evaluation mode, on the images' device.
        images: uint8 RGB, B x 3 x H x W.
        input_size: Height and width that the network sees; bilinear with antialiasing.
        output_size: Height and width of the result; bilinear, corners not aligned.

    Returns:
        Train ids, uint8, B x height x width.
    """
    pixels = images.float() / 255
    if images.shape[-2:] != input_size:
        pixels = F.interpolate(pixels, input_size, mode="bilinear", align_corners=False, antialias=True)
    logits = model(pixels).logits.float()
    return F.interpolate(logits, output_size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


def input_size(config: RunConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width at which the network sees an image of this size.

    evaluation.input_size, or with the shorter edge at the middle of data.shorter_edge and the aspect ratio kept.
    """
    if config.evaluation.input_size is not None:
        return config.evaluation.input_size
    scale = sum(config.data.shorter_edge) / 2 / min(height, width)
    return round(height * scale), round(width * scale)
