"""Pictures of a micro-batch for the trackers: its images and what the network, the teacher and the cycles make of them.

What is drawn has been computed by the step anyway. No network runs for it and no random number is drawn, so a run with
pictures computes the same as one without. Rank 0 draws; the ranks of the first few images send it theirs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.data.collate import Batch
from dist_pca.objective import Domain, Domains
from dist_pca.training.metrics import MetricsLogger
from dist_pca.training.views import Views

MOST_IMAGES = 4
"""Images of each domain that are drawn; a rank sends all of its images, so there may be a few more."""
_log = logging.getLogger("dist_pca.training")


class DrawnView(NamedTuple):
    """Images of one view, and what is known about them; without gradients."""

    images: torch.Tensor
    """uint8 [m, C, H, W]."""
    domain: Domain
    """Floating-point tensors are fp32."""


class PictureLog:
    """Draws pictures every `telemetry.pictures_every` steps and logs them to the trackers."""

    def __init__(
        self,
        config: RunConfig,
        classes: Sequence[ClassInfo],
        metrics: MetricsLogger,
        draw: Callable[..., Mapping[str, Any]],
    ) -> None:
        """Store where pictures come from and go to.

        Args:
            config: The run.
            classes: Classes by train id.
            metrics: Has the trackers.
            draw: Draws on rank 0, as `dist_pca.evaluation.training_pictures.training_pictures`.
        """
        self._config, self._classes, self._metrics, self._draw = config, classes, metrics, draw
        self._step = 0

    def log(
        self, step: int, batches: tuple[Batch, Batch | None], views: Views, domains: Domains, terms: Mapping[str, Any]
    ) -> None:
        """Log pictures of the first micro-batch of step `step` (from 1), if they are due then. Collective.

        Args:
            step: The step.
            batches: Source and target as they were read.
            views: Views of them that the student was trained on.
            domains: The network's outputs for the views.
            terms: Terms of the micro-batch.
        """
        if step % self._config.telemetry.pictures_every or step == self._step:
            return
        self._step = step
        ranks = min(dist.get_world_size(), -(-MOST_IMAGES // len(batches[0].images)))
        if dist.get_rank() >= ranks:
            return
        # Only cycles need the images of other ranks, and they only those of source and target.
        shown = {
            name: _gathered(_drawn_view(batch.images, domain), ranks)
            for name, batch, domain in zip(("source", "target"), batches, domains, strict=False)
            if batch is not None and domain is not None
        }
        if dist.get_rank() != 0:
            return
        shown |= {
            name: _drawn_view(view.images, domain)
            for name, view, domain in (("mixed", views.mixed, domains.mixed), ("masked", views.masked, domains.masked))
            if view is not None and domain is not None
        }
        try:
            pictures = self._draw(
                self._config, self._classes, shown, step=step, ranks=ranks, share=terms.get("confident_share")
            )
        # A picture is worth no run; all communication is done.
        except Exception as error:
            _log.warning("no pictures of step %d: %s: %s", step, type(error).__name__, " ".join(str(error).split()))
            return
        self._metrics.log_pictures(pictures, step)


def _drawn_view(images: torch.Tensor, domain: Domain) -> DrawnView:
    """Copy what is drawn of a view, without gradients."""
    if images.is_floating_point():
        images = (255 * images.detach().float()).round().clamp(0, 255).to(torch.uint8)
    values: dict[str, Any] = {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in domain._replace(deepest=None, pretrained=None)._asdict().items()
        if torch.is_tensor(value)
    }
    return DrawnView(images, Domain(**{"labels": None, **values}))


def _gathered(view: DrawnView, ranks: int) -> DrawnView:
    """Concatenate a view of the first ranks on rank 0; the others send theirs and return it."""
    rank = dist.get_rank()
    names = [name for name, value in view.domain._asdict().items() if torch.is_tensor(value)]
    whole = []
    for tensor in (view.images, *(getattr(view.domain, name) for name in names)):
        own = tensor.contiguous()
        if rank > 0:
            dist.send(own, 0)
            continue
        parts = [own]
        for sender in range(1, ranks):
            parts.append(torch.empty_like(own))
            dist.recv(parts[-1], sender)
        whole.append(torch.cat(parts))
    if rank > 0:
        return view
    gathered: dict[str, Any] = dict(zip(names, whole[1:], strict=True))
    return DrawnView(whole[0], view.domain._replace(**gathered))
