"""Feature distance: keep what the pretrained backbone knows of things (DAFormer, Hoyer et al., CVPR 2022)."""

import difflib
from collections.abc import Sequence

import torch

from dist_pca.config import FeatureDistanceConfig
from dist_pca.errors import UserError
from dist_pca.objective.reduction import world_mean
from dist_pca.shards.classes import ClassInfo

THINGS = (
    *("traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""Classes of Cityscapes that are counted one by one, as DAFormer takes them."""


def feature_distance(
    features: torch.Tensor, pretrained: torch.Tensor, labels: torch.Tensor, things: Sequence[int]
) -> torch.Tensor:
    """Mean Euclidean distance of a backbone's map to the pretrained one's, over cells that show a thing (section 3.3).

    Collective.

    Args:
        features: [B, C, h, w], the deepest map of the backbone that trains.
        pretrained: [B, C, h, w], the frozen backbone's for the same images; gets no gradient.
        labels: int64 [B, h * w], class of each cell, 255 for cells of no one class.
        things: Classes whose cells count.

    Returns:
        Scalar, scaled so that gradients averaged over ranks are those of the mean over all ranks' cells; 0 with a
        graph where no cell shows a thing.
    """
    # d_i = ||f_i - g_i||_2
    distances = torch.linalg.vector_norm(features - pretrained.detach(), dim=1).flatten(1)
    counted = torch.isin(labels, torch.tensor(things, device=labels.device))
    return world_mean(distances[counted].sum(), counted.sum())


def thing_classes(config: FeatureDistanceConfig, classes: Sequence[ClassInfo]) -> tuple[int, ...]:
    """Train ids of the classes whose cells count; none where the term is off.

    Raises:
        UserError: `objective.feature_distance.classes` names a class that the run does not have, or is left out and the
            run has none of Cityscapes' thing classes.
    """
    if config.weight == 0:
        return ()
    names = [info.name for info in classes]
    wanted = config.classes or [name for name in THINGS if name in names]
    if not wanted:
        raise UserError(
            "objective.feature_distance.classes: the run has none of Cityscapes' thing classes; "
            f"name some of {', '.join(names)}"
        )
    for name in wanted:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise UserError(
                f"objective.feature_distance.classes: {name!r} is no class of the run; the nearest is {nearest!r}"
            )
    return tuple(names.index(name) for name in wanted)
