"""What the network has computed for each view of a micro-batch, and what is known of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

IGNORE_INDEX = 255
"""Label of pixels that no term counts."""


class Domain(NamedTuple):
    """One domain's crops: outputs of the network for them, and what is known of them."""

    logits: torch.Tensor
    """[B, K, h, w]"""
    features: torch.Tensor
    """[B, C, h', w']"""
    labels: torch.Tensor | None
    """Integer [B, H, W] at crop resolution, 255 ignored: true ones, which for the target serve diagnosis alone, or of
    mixed and masked images pseudo labels."""
    seeds: Sequence[int] = ()
    """B seeds, one of each crop, for the pixels that a budget picks."""
    confident: torch.Tensor | None = None
    """bool [B, H, W], where pseudo labels are confident; None where labels are true ones."""
    trusted: torch.Tensor | None = None
    """bool [B, H, W], where a mixed image shows the source and has its label."""
    truth: torch.Tensor | None = None
    """Integer [B, H, W], true labels beside pseudo labels, for diagnosis alone."""
    teacher_logits: torch.Tensor | None = None
    """[B, K, h, w], the teacher's for the same crops in their own colours, where association asks for them."""
    teacher_features: torch.Tensor | None = None
    """[B, C, h', w'], likewise."""
    deepest: torch.Tensor | None = None
    """[B, C", h", w"], the backbone's deepest map, where the feature distance asks for it."""
    pretrained: torch.Tensor | None = None
    """[B, C", h", w"], the frozen backbone's for the same images."""


class Domains(NamedTuple):
    """All that the student has seen in a micro-batch."""

    source: Domain
    target: Domain | None = None
    mixed: Domain | None = None
    """Target images with pasted source classes, and their labels (ClassMix)."""
    masked: Domain | None = None
    """Target images with hidden blocks, and their pseudo labels (MIC)."""
