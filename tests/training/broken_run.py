"""`dist_pca.train` whose rank 1 has NaN logits in step 3, and a NaN loss in the steps 5 and 6."""

import os
from itertools import count
from typing import Any

import torch
import typer

from dist_pca import train
from dist_pca.objective import Domains, objective
from dist_pca.training import trainer
from dist_pca.training.views import forward_views

steps = count(1)


def broken_forward_views(*arguments: Any, **options: Any) -> Domains:
    domains = forward_views(*arguments, **options)
    if next(steps) != 3:
        return domains
    return domains._replace(source=domains.source._replace(logits=domains.source.logits * torch.nan))


def broken_objective(*arguments: Any, step: int, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, terms = objective(*arguments, step=step, **options)
    if step + 1 in (5, 6):
        return loss * torch.nan, terms | {"lovasz": terms["lovasz"] * torch.nan}
    return loss, terms


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        vars(trainer).update(forward_views=broken_forward_views, objective=broken_objective)
    typer.run(train.main)
