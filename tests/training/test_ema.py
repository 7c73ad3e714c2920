"""The moving average of the weights is that of a plain loop over whole parameters, and outlives its ranks."""

from pathlib import Path

import pytest

from tests.training.zero_runs import STEPS, assert_equal, plain, run_config, through_deepspeed

pytestmark = pytest.mark.slow
DECAY = "training.ema_decay=0.6"
"""Reached in the second step, so that both the plain mean before and the decay after are seen."""


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (stage, ranks) if stage == ranks == 2 else pytest.param(stage, ranks, marks=pytest.mark.exhaustive)
        for stage in (1, 2, 3)
        for ranks in (1, 2)
    ],
)
def test_partitions_are_averaged_as_a_plain_loop_averages_whole_parameters(
    tmp_path: Path, stage: int, ranks: int
) -> None:
    config = run_config(stage, "sgd", DECAY)
    assert_equal(through_deepspeed(tmp_path, config, ranks), plain(config, STEPS), config)


@pytest.mark.exhaustive
def test_an_average_goes_on_under_other_stages_and_world_sizes(tmp_path: Path) -> None:
    checkpoint, step = None, 0
    sizes = ["training.source_batch=6", "training.target_batch=6"]
    for stage, ranks in ((2, 2), (3, 1), (1, 3), (3, 2)):
        config = run_config(stage, "sgd", DECAY, *sizes)
        checkpoint = through_deepspeed(tmp_path, config, ranks, first=step, last=step + 1, load=checkpoint)
        step += 1
    assert checkpoint is not None
    assert_equal(checkpoint, plain(config, step), config)
