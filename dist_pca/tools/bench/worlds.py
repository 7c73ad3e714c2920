"""Compare a run that is resumed at other world sizes with one whose world size never changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_pca.tools.bench.report import Record
from dist_pca.tools.bench.resume import draw_streets, train_to_the_end

RANKS = (2, 1, 3, 2)
STEPS = 4
"""On each number of ranks."""


def measure_worlds(folder: Path, tell: Callable[[str], object]) -> list[Record]:
    """Train on 2, 1, 3 and 2 processes one after the other, and on 2 all the time; fp32, batch norm over all ranks.

    Args:
        folder: Where the runs go.
        tell: Called with a description of each step.

    Raises:
        UserError: a run does not end as it should.
    """
    draw_streets(folder)
    last = STEPS * len(RANKS)
    settings: dict[str, Any] = {
        "training__source_batch": 6,
        "training__target_batch": 6,
        "schedule__horizon": last,
        "model__batch_norm": "sync",
        # Predictions of a network that has learnt little tie up to rounding: with them a cycle in eighty is kept on
        # one number of ranks and not on another, now and then, and the loss moves by a few 1e-5.
        "objective__association__levels": "[features]",
        # Features upsampled by more than two repeat at a picture's border: exact ties, which rounding then decides.
        "model__association_stride": "null",
        "model__output_stride": "8",
        "objective__self_training__start_step": 2,
        "objective__self_training__threshold": 0.2,
        # At adamw's usual 1e-8 a first update is the sign of the gradient, and rounding decides where that is about 0.
        "optimizer__epsilon": 1e-3,
        "telemetry__sample_keys": "true",
    }
    tell("training on 2 processes")
    train_to_the_end(folder, "steady", last, **settings)
    for number, ranks in enumerate(RANKS, 1):
        tell(f"resuming on {ranks} processes, {number} of {len(RANKS)}")
        train_to_the_end(folder, "moving", STEPS * number, ranks, **settings)
    steady, moving = (_lines(folder / name / "metrics.jsonl") for name in ("steady", "moving"))
    samples = [_lines(folder / name / "samples.jsonl") for name in ("steady", "moving")]
    losses = [abs(one["loss"] - other["loss"]) for one, other in zip(steady, moving, strict=True)]
    return [
        {"name": "world_sizes", "value": "-".join(map(str, RANKS))},
        {"name": "world_steps_with_other_samples", "value": sum(a != b for a, b in zip(*samples, strict=True))},
        {"name": "world_largest_loss_difference", "value": max(losses)},
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
