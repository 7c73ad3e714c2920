"""Views of a batch for training with a teacher: colour augmentation, mixed domains, hidden blocks.

Random numbers are a function of the run's seed and the sample index, so views are the same at any world size, with any
number of loader processes, and after every restart. Images are on the training device.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import functional as tv

from dist_pca.classes import IGNORE_INDEX
from dist_pca.config import PhotometricConfig
from dist_pca.data.randomness import Domain, Purpose, draw

Uniform = npt.NDArray[np.float64]
_LABELS = 256
"""Number of values of a uint8 label."""
_LAST = 2**63 - 1
"""Priority of classes that an image does not contain."""


def photometric_view(
    images: torch.Tensor, indices: Sequence[int], config: PhotometricConfig, *, seed: int, domain: Domain
) -> torch.Tensor:
    """Jitter brightness, contrast, saturation and hue of each image, and blur it (DACS, Tranheden et al. 2021).

    Images of other than three bands have no saturation, hue or grey, and the contrast of each band is its own.

    Args:
        images: [B, C, H, W], uint8 or floating point in 0..1.
        indices: B sample indices.
        config: Kind, strength and probability of changes.
        seed: Seed of the run.
        domain: Domain of the images; the two domains draw independently.

    Returns:
        [B, C, H, W] floating point in 0..1; the input itself if the config changes nothing.
    """
    if not config.changes or domain not in config.domains:
        return images
    views = images.float() / 255 if images.dtype == torch.uint8 else images
    return torch.stack(
        [
            _change(view, config, _uniform(12, seed, domain, Purpose.PHOTOMETRIC, index))
            for view, index in zip(views, indices, strict=True)
        ]
    )


def class_mask(labels: torch.Tensor, indices: Sequence[int], *, seed: int) -> torch.Tensor:
    """Choose the pixels that ClassMix pastes: half of the classes of each label, rounded up (Olsson et al. 2021).

    Args:
        labels: [B, H, W] train ids of the source; pixels of 255, which is no class, are never pasted.
        indices: B sample indices of the target images onto which pixels are pasted.
        seed: Seed of the run.

    Returns:
        bool [B, H, W].
    """
    masks = []
    for label, index in zip(labels, indices, strict=True):
        # Neither shapes nor host code depend on which classes are present, so there is no synchronisation with the GPU.
        present = torch.zeros(_LABELS, dtype=torch.bool, device=label.device)
        present.scatter_(0, label.long().flatten(), True)
        present[IGNORE_INDEX] = False
        priorities = torch.from_numpy((draw(_LABELS, seed, "target", Purpose.CLASS_MIX, index) >> 1).astype(np.int64))
        drawn = priorities.to(label.device, non_blocking=True)
        places = torch.where(present, drawn, _LAST).argsort().argsort()
        chosen = present & (places < (present.sum() + 1) // 2)
        masks.append(chosen[label.long()])
    return torch.stack(masks)


def block_mask(images: torch.Tensor, indices: Sequence[int], *, seed: int, block: int, ratio: float) -> torch.Tensor:
    """Choose the pixels that stay visible in masked consistency; each block is hidden with probability `ratio`.

    Masked Image Consistency, Hoyer et al. 2023, equation 3.

    Args:
        images: [B, C, H, W].
        indices: B sample indices.
        seed: Seed of the run.
        block: Edge length of a block, in pixels.
        ratio: Share of hidden blocks.

    Returns:
        bool [B, 1, H, W], True where the image is visible.
    """
    height, width = images.shape[-2:]
    rows, columns = -(-height // block), -(-width // block)
    visible = np.stack([_uniform(rows * columns, seed, "target", Purpose.BLOCKS, index) >= ratio for index in indices])
    blocks = torch.from_numpy(visible.reshape(-1, 1, rows, columns)).to(images.device, non_blocking=True)
    return blocks.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3)[..., :height, :width]


def _change(view: torch.Tensor, config: PhotometricConfig, chance: Uniform) -> torch.Tensor:
    """Augment one image [C, H, W] in 0..1, given twelve uniform random numbers."""
    in_color = len(view) == 3
    # Each other band is a grey image of its own, whose saturation and hue torchvision leaves as they are.
    view = view if in_color else view[:, None]
    if chance[0] < config.probability:
        spreads = config.brightness, config.contrast, config.saturation
        factors = [1 + spread * (2 * u - 1) for spread, u in zip(spreads, chance[1:4], strict=True)]
        changes = [
            lambda image: tv.adjust_brightness(image, factors[0]),
            lambda image: tv.adjust_contrast(image, factors[1]),
            lambda image: tv.adjust_saturation(image, factors[2]),
            lambda image: tv.adjust_hue(image, config.hue * (2 * chance[4] - 1)),
        ]
        # The result depends on the order of the changes, so the order is random too.
        for turn in np.argsort(chance[5:9]):
            view = changes[turn](view)
    if in_color and chance[9] < config.grey_probability:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    if chance[10] < config.blur_probability:
        low, high = config.blur_sigma
        sigma = low + (high - low) * float(chance[11])
        # Three standard deviations to each side contain all but 0.3 % of a Gaussian.
        radius = min(max(1, math.ceil(3 * sigma)), min(view.shape[-2:]) - 1)
        # Rounded, the weights of a blur may sum to slightly more than 1.
        view = tv.gaussian_blur(view, [2 * radius + 1, 2 * radius + 1], [sigma, sigma]).clamp(max=1)
    return view if in_color else view[:, 0]


def _uniform(count: int, seed: int, domain: Domain, purpose: Purpose, index: int) -> Uniform:
    """Draw uniform numbers in [0, 1)."""
    # The upper 53 bits fill the mantissa of a double.
    bits: Uniform = (draw(count, seed, domain, purpose, index) >> np.uint64(11)).astype(np.float64)
    return bits / 2.0**53
