"""`dist_pca.train` whose rank 1 has NaN logits in step 3, and a NaN loss in the steps 5 and 6."""

import os
from itertools import count
from typing import Any

import torch
import typer

from dist_pca import train
from dist_pca.objective import Domains
from dist_pca.training import trainer

steps = count(1)
sound_forward_views, sound_objective = trainer.forward_views, trainer.objective


def forward_views(*arguments: Any, **options: Any) -> Domains:
    domains = sound_forward_views(*arguments, **options)
    if next(steps) != 3:
        return domains
    return domains._replace(source=domains.source._replace(logits=domains.source.logits * torch.nan))


def objective(*arguments: Any, step: int, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, terms = sound_objective(*arguments, step=step, **options)
    if step + 1 in (5, 6):
        return loss * torch.nan, terms | {"lovasz": terms["lovasz"] * torch.nan}
    return loss, terms


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        trainer.forward_views, trainer.objective = forward_views, objective  # type: ignore[assignment]
    typer.run(train.main)
