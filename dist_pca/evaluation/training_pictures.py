"""Pictures of a training step, drawn from what the step has computed."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.evaluation.cycle_picture import draw_cycles, image_names, sample_cycles
from dist_pca.evaluation.cycles import judge
from dist_pca.evaluation.pictures import color_labels, grid_picture
from dist_pca.objective.cycle_association import association_weight
from dist_pca.shards.bands import shown
from dist_pca.training.pictures import DrawnView

Pixels = npt.NDArray[np.uint8]
ROWS = 2
"""Images in a picture of a view."""


@torch.no_grad()
def training_pictures(
    config: RunConfig,
    classes: Sequence[ClassInfo],
    views: Mapping[str, DrawnView],
    *,
    step: int,
    ranks: int,
    share: torch.Tensor | None,
) -> dict[str, Pixels]:
    """Draw each view of the first images, and the cycles among them.

    Args:
        config: The run.
        classes: Classes by train id.
        views: `source`, and of the views `target`, `mixed` and `masked` those that there are.
        step: Step of the views, from 1.
        ranks: Ranks that the images of source and target come from, in order.
        share: Share of confident target pixels over all ranks, scalar; None without pseudo labels.

    Returns:
        RGB images (height x width x 3) by name.
    """
    pictures = {
        f"pictures/{name}": _view_picture(view, classes, None if share is None else float(share))
        for name, view in views.items()
    }
    association = config.objective.association
    if not config.objective.adapt or "target" not in views or association_weight(association, step - 1) == 0:
        return pictures
    source, target = views["source"], views["target"]
    images = [shown(view.images.permute(0, 2, 3, 1).cpu().numpy()) for view in (source, target)]
    # All pixels take part, as in the diagnosis of a trained run.
    association = association.model_copy(update={"pixel_budget": None})
    for level in association.levels:
        candidate_sets = judge(association, level, source.domain, target.domain)
        drawn = draw_cycles(
            images,
            (candidate_sets[0].source_grid, candidate_sets[0].target_grid),
            sample_cycles(candidate_sets, seed=step),
            classes,
            [image_names(len(own), ranks) for own in images],
        )
        pictures[f"pictures/cycles_{level}"] = np.asarray(drawn)
    return pictures


def _view_picture(view: DrawnView, classes: Sequence[ClassInfo], share: float | None) -> Pixels:
    """Draw the first images of a view with labels, prediction, and confidence and weight of pseudo labels."""
    domain = view.domain
    columns = {"input": shown(view.images[:ROWS].permute(0, 2, 3, 1).cpu().numpy())}
    size = view.images.shape[-2:]

    def colored(labels: torch.Tensor) -> Pixels:
        return color_labels(labels[:ROWS].to(torch.uint8).cpu().numpy(), classes)

    def predicted(logits: torch.Tensor) -> Pixels:
        return colored(F.interpolate(logits[:ROWS], size, mode="bilinear", align_corners=False).argmax(dim=1))

    if domain.labels is not None:
        columns["pseudo labels" if domain.confident is not None else "truth"] = colored(domain.labels)
    if domain.confident is not None and share is not None:
        trusted = torch.zeros_like(domain.confident) if domain.trusted is None else domain.trusted
        columns["confident"] = _grey((domain.confident | trusted).float())
        columns["weight"] = _grey(torch.where(trusted, 1.0, share))
    if domain.teacher_logits is not None:
        columns["teacher"] = predicted(domain.teacher_logits)
    columns["prediction"] = predicted(domain.logits)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return np.asarray(grid_picture(rows, list(columns), classes, width=320))


def _grey(values: torch.Tensor) -> Pixels:
    """Values in 0..1, [m, H, W], as grey images of which the first are kept."""
    grey: Pixels = (255 * values[:ROWS]).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).cpu().numpy()
    return grey
