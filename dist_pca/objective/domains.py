"""Outputs of the network and labels for each view of a micro-batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

IGNORE_INDEX = 255
"""Label of pixels that every term ignores."""


class Domain(NamedTuple):
    """Outputs of the network, labels and teacher outputs for one domain's crops."""

    logits: torch.Tensor
    """Logits [B, K, h, w]."""
    features: torch.Tensor
    """Pixel features for association, [B, C, h', w']."""
    labels: torch.Tensor | None
    """Labels, integer [B, H, W] at crop resolution, 255 for ignore. True labels, which for the target are used for
    diagnostics only; pseudo labels for mixed and masked images."""
    seeds: Sequence[int] = ()
    """B seeds, one per crop, for sampling pixels under a budget."""
    confident: torch.Tensor | None = None
    """Where pseudo labels are confident, bool [B, H, W]; None if labels are true ones."""
    trusted: torch.Tensor | None = None
    """Where a mixed image has source pixels and labels, bool [B, H, W]."""
    truth: torch.Tensor | None = None
    """True labels in addition to pseudo labels, integer [B, H, W], for diagnostics only."""
    teacher_logits: torch.Tensor | None = None
    """Teacher's logits for the same crops without colour augmentation, [B, K, h, w], if association needs them."""
    teacher_features: torch.Tensor | None = None
    """Teacher's pixel features for the same crops, [B, C, h', w'], if association needs them."""
    deepest: torch.Tensor | None = None
    """The backbone's deepest map, [B, C", h", w"], if the feature distance needs it."""
    pretrained: torch.Tensor | None = None
    """The frozen backbone's deepest map for the same images, [B, C", h", w"]."""


class Domains(NamedTuple):
    """The student's outputs for all views of a micro-batch."""

    source: Domain
    target: Domain | None = None
    mixed: Domain | None = None
    """Target images with pasted source classes, and their labels (ClassMix)."""
    masked: Domain | None = None
    """Target images with hidden blocks, and their pseudo labels (MIC)."""
