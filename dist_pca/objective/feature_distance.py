"""Feature distance to the pretrained backbone on thing classes (DAFormer, Hoyer et al., CVPR 2022)."""

from collections.abc import Sequence

import torch

from dist_pca.classes import ClassInfo
from dist_pca.config import FeatureDistanceConfig
from dist_pca.errors import UserError, nearest
from dist_pca.objective.reduction import world_mean

THINGS = (
    *("traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""Thing classes of Cityscapes, as in DAFormer."""


def feature_distance(
    features: torch.Tensor, pretrained: torch.Tensor, labels: torch.Tensor, things: Sequence[int]
) -> torch.Tensor:
    """Mean Euclidean distance of a backbone's map to the pretrained one's, over cells of thing classes (section 3.3).

    Collective.

    Args:
        features: Deepest map of the trained backbone, [B, C, h, w].
        pretrained: Deepest map of the frozen backbone for the same images, [B, C, h, w]; gets no gradient.
        labels: Class of each cell, int64 [B, h * w]; 255 for cells without a class.
        things: Train ids of the thing classes.

    Returns:
        Scalar, scaled so that the average of gradients over ranks is the gradient of the mean over all ranks' cells; 0,
        with a graph, if there are no such cells.
    """
    # d_i = ||f_i - g_i||_2
    distances = torch.linalg.vector_norm(features - pretrained.detach(), dim=1).flatten(1)
    counted = torch.isin(labels, torch.tensor(things, device=labels.device))
    return world_mean(distances[counted].sum(), counted.sum())


def thing_classes(config: FeatureDistanceConfig, classes: Sequence[ClassInfo]) -> tuple[int, ...]:
    """Train ids of the classes whose cells are used; empty if the term is off.

    Raises:
        UserError: `objective.feature_distance.classes` has a class that is not one of the run's, or it is None and the
            run has none of Cityscapes' thing classes.
    """
    if config.weight == 0:
        return ()
    names = [info.name for info in classes]
    wanted = config.classes or [name for name in THINGS if name in names]
    if not wanted:
        raise UserError(
            "objective.feature_distance.classes: the run has none of Cityscapes' thing classes; "
            f"set the key to some of {', '.join(names)}"
        )
    for name in wanted:
        if name not in names:
            raise UserError(
                f"objective.feature_distance.classes: {name!r} is not a class of the run; "
                f"the nearest is {nearest(name, names)!r}"
            )
    return tuple(names.index(name) for name in wanted)
