"""Domains whose matches are known: each pixel's features say what it looks like, and a little where it is."""

import torch

from dist_pca.classes import ClassInfo
from dist_pca.objective.domains import Domain

ROAD, SKY, CAR, NONE = 0, 1, 2, 255
CLASSES = (ClassInfo("road", (128, 64, 128)), ClassInfo("sky", (70, 130, 180)), ClassInfo("car", (0, 0, 142)))
SOURCE = [[SKY] * 4, [SKY] * 4, [ROAD] * 4, [ROAD, ROAD, CAR, CAR]]
LOOKS = [[SKY] * 4, [SKY] * 4, [ROAD] * 4, [ROAD] * 4]
"""The target shows the same scene, and its cars look like road."""
TRUTH = [[NONE, SKY, SKY, SKY], [SKY] * 4, [CAR, ROAD, ROAD, ROAD], [ROAD, ROAD, CAR, CAR]]


def scene(looks: list[list[int]], labels: list[list[int]]) -> Domain:
    """One image whose pixels look like one class and are labelled as another."""
    grid = torch.tensor(looks)
    # A pixel matches its own place where the looks agree.
    places = 0.1 * torch.eye(grid.numel()).view(*grid.shape, -1)
    features = torch.cat([torch.eye(3)[grid], places], dim=2).permute(2, 0, 1)[None]
    logits = 4 * torch.eye(3)[grid].permute(2, 0, 1)[None]
    return Domain(logits, features, torch.tensor(labels, dtype=torch.uint8)[None])


def random_domain(images: int, seed: int, *, teacher: bool = False) -> Domain:
    """Images of random features and labels, some pixels without one; with a teacher's outputs if asked."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(channels: int) -> torch.Tensor:
        return torch.randn(images, channels, 4, 5, generator=generator)

    labels = torch.randint(0, 4, (images, 4, 5), generator=generator)
    logits, features, taught, taught_features = drawn(3), drawn(6), drawn(3), drawn(6)
    return Domain(
        logits,
        features,
        torch.where(labels == 3, NONE, labels),
        teacher_logits=taught if teacher else None,
        teacher_features=taught_features if teacher else None,
    )
