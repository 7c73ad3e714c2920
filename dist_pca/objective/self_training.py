"""Self-training: cross-entropy with a teacher's pseudo labels, weighted by the teacher's confidence.

DACS (Tranheden et al., WACV 2021) on images mixed by ClassMix (Olsson et al., WACV 2021); Masked Image Consistency
(Hoyer et al., CVPR 2023) on images with hidden blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dist_pca.distributed import all_reduce_sum, world_size
from dist_pca.objective.domains import IGNORE_INDEX


class PseudoLabels(NamedTuple):
    """Pseudo labels of B target images."""

    labels: torch.Tensor
    """Most probable class, int64 [B, H, W]; ignored rows and columns are 255."""
    confident: torch.Tensor
    """Whether its probability reaches the threshold, bool [B, H, W]; of ignored pixels too."""


def pseudo_labels(
    logits: torch.Tensor,
    size: torch.Size,
    *,
    threshold: float,
    ignore_top: float = 0.0,
    ignore_bottom: float = 0.0,
    ignore_sides: float = 0.0,
    beside: Sequence[tuple[int, int]] = (),
) -> PseudoLabels:
    """Compute pseudo labels from a teacher's logits.

    Args:
        logits: [B, K, h, w].
        size: H and W of the images; logits are upsampled bilinearly, corners not aligned.
        threshold: Probability from which a label is confident.
        ignore_top: Share of rows at the top that get no label.
        ignore_bottom: Share of rows at the bottom that get no label.
        ignore_sides: Share of the columns of the image that a crop is from, at each side of it, that get no label.
        beside: For each crop, the columns of its image to the left and to the right of it; empty for whole images.
    """
    full = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    probability, labels = full.softmax(dim=1).max(dim=1)
    height, width = labels.shape[1:]
    labels[:, : round(ignore_top * height)] = IGNORE_INDEX
    labels[:, height - round(ignore_bottom * height) :] = IGNORE_INDEX
    if ignore_sides > 0:
        for crop, (left, right) in zip(labels, beside or [(0, 0)] * len(labels), strict=True):
            ignored = round(ignore_sides * (left + width + right))
            crop[:, : max(0, ignored - left)] = IGNORE_INDEX
            crop[:, width - max(0, ignored - right) :] = IGNORE_INDEX
    return PseudoLabels(labels, probability >= threshold)


class Confidence(NamedTuple):
    """Confidence of a teacher on all ranks' target images."""

    share: torch.Tensor
    """Share of confident pixels q, scalar."""
    pixels: torch.Tensor
    """Number of pixels N, including ignored ones, scalar."""


def world_confidence(confident: torch.Tensor) -> Confidence:
    """Count confident pixels (bool [B, H, W]) over all ranks. Collective."""
    # At large world sizes, pixel counts exceed the precision of fp32.
    counts = torch.stack([confident.sum(), torch.full((), confident.numel(), device=confident.device)]).double()
    sure, pixels = all_reduce_sum(counts)
    return Confidence((sure / pixels).float(), pixels)


def pseudo_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, confidence: Confidence, trusted: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy with pseudo labels, weighted by the share of confident pixels.

    `(1 / N) sum_i w_i CE_i` over all N pixels of all ranks, including ignored ones, with `w_i = 1` for trusted labels
    and `w_i = q` for others. q is a share over all ranks, so it does not depend on how images are divided among them.

    Args:
        logits: [B, K, h, w], upsampled bilinearly to the labels' size.
        labels: int64 [B, H, W], 255 for pixels that are left out.
        confidence: q and N.
        trusted: Pixels that were pasted from the source with their labels, bool [B, H, W]; None if there are none.

    Returns:
        Scalar, scaled so that the average of gradients over ranks is the gradient of the mean over all ranks' pixels.
    """
    full = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    weight = confidence.share if trusted is None else torch.where(trusted, 1.0, confidence.share)
    entropy = F.cross_entropy(full, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return world_size() * (weight * entropy).sum() / confidence.pixels.to(full.dtype)
