"""Pixel features and labels on the association grid."""

import torch
import torch.nn.functional as F

from dist_pca.config import Level
from dist_pca.objective.domains import IGNORE_INDEX


def pixels_at(level: Level, features: torch.Tensor, logits: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Pixels of each image on a grid, [B, h * w, C]: features, or class probabilities averaged over cells."""
    values = features.float() if level == "features" else logits.float().softmax(dim=1)
    if values.shape[-2:] != grid:
        values = F.interpolate(values, grid, mode="area")
    return values.flatten(2).mT


def labels_at(
    labels: torch.Tensor | None, grid: torch.Size, num_classes: int, *, share: float = 0.0
) -> torch.Tensor | None:
    """Labels of a grid's cells, int64 [B, h * w].

    Args:
        labels: [B, H, W], 255 ignored.
        grid: h and w.
        num_classes: Number of classes K; labels are below it.
        share: Least share of a cell's pixels that must agree for the cell to have a label; 0 takes the nearest pixel's
            label.
    """
    if labels is None:
        return None
    if share == 0:
        return F.interpolate(labels[:, None].float(), size=grid, mode="nearest").flatten(1).long()
    # One class at a time: all of them at the labels' resolution would take 8 K bytes of each pixel.
    cells = [F.interpolate((labels == c).float()[:, None], size=grid, mode="area") for c in range(num_classes)]
    shares, majority = torch.cat(cells, dim=1).max(dim=1)
    # The tolerance keeps rounding from rejecting a share that is exactly the threshold.
    return torch.where(shares >= share - 1e-6, majority, IGNORE_INDEX).flatten(1)
