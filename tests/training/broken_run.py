"""`dist_pca.train` whose rank 1 has NaN logits in step 3, and a NaN loss in the steps 5 and 6."""

import os
from itertools import count
from typing import Any

import torch
import typer

from dist_pca import train
from dist_pca.objective import Domain
from dist_pca.training import loop

steps = count(1)
sound_forward, sound_objective = loop.forward, loop.objective


def forward(*arguments: Any, **options: Any) -> tuple[Domain, Domain | None]:
    source, target = sound_forward(*arguments, **options)
    return (source._replace(logits=source.logits * torch.nan) if next(steps) == 3 else source), target


def objective(*arguments: Any, step: int, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, terms = sound_objective(*arguments, step=step, **options)
    if step + 1 in (5, 6):
        return loss * torch.nan, terms | {"lovasz": terms["lovasz"] * torch.nan}
    return loss, terms


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        loop.forward, loop.objective = forward, objective  # type: ignore[assignment]
    typer.run(train.main)
