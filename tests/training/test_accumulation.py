"""Micro-batches that share one loss make the update of the bigger batch, on any number of ranks and at any scope."""

from pathlib import Path

import pytest
import torch

from tests.training.zero_runs import STEPS, Trained, assert_equal, network, plain, run_config, through_deepspeed

FREE_OF_BATCH_STATISTICS = ("model.batch_norm=frozen",)
COMMON = ("training.source_batch=8", "training.target_batch=8", *FREE_OF_BATCH_STATISTICS)


def apart(one: Trained, other: Trained) -> float:
    """How far two trainings end from each other, in units of how far they went."""
    start = dict(network(run_config(2, "sgd", *COMMON)).named_parameters())
    distance = torch.cat([(value - other[0][name]).flatten() for name, value in one[0].items()]).norm()
    moved = torch.cat([(start[name] - value).flatten() for name, value in other[0].items()]).norm()
    return float((distance / moved).detach())


@pytest.mark.parametrize("scope", ["pair", "world"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_loss_over_micro_batches_is_that_of_the_bigger_batch(scope: str, accumulation: int) -> None:
    settings = (*COMMON, f"objective.association.scope={scope}")
    whole = plain(run_config(2, "sgd", *settings), 2)
    pooled = run_config(
        2, "sgd", *settings, f"training.accumulation={accumulation}", "training.accumulation_pool=update"
    )
    assert apart(plain(pooled, 2), whole) < 1e-4


def test_separate_losses_are_not_the_bigger_batchs_where_labels_and_cycles_are_shared_out_unevenly() -> None:
    whole = plain(run_config(2, "sgd", *COMMON), 2)
    separate = plain(run_config(2, "sgd", *COMMON, "training.accumulation=4"), 2)
    assert apart(separate, whole) > 1e-2


def test_running_statistics_follow_each_micro_batch_once() -> None:
    settings = (
        "training.source_batch=8",
        "training.target_batch=8",
        "training.accumulation=4",
        "model.batch_norm=local",
    )
    # Without a step in between, both see the same activations.
    still = ("optimizer.lr=1e-30",)
    separate, pooled = (
        plain(run_config(2, "sgd", *settings, *still, f"training.accumulation_pool={pool}", "training.ema_decay=0"), 1)[
            1
        ]
        for pool in ("micro_batch", "update")
    )
    torch.testing.assert_close(pooled, separate, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("stage", "ranks", "scope", "exchange"),
    [
        (2, 2, "world", "gather"),
        pytest.param(1, 2, "world", "ring", marks=pytest.mark.exhaustive),
        pytest.param(3, 2, "world", "gather", marks=pytest.mark.exhaustive),
        pytest.param(2, 2, "pair", "auto", marks=pytest.mark.exhaustive),
        pytest.param(2, 1, "world", "gather", marks=pytest.mark.exhaustive),
    ],
)
def test_one_loss_over_ranks_and_micro_batches_is_that_of_one_process_on_the_whole_batch(
    tmp_path: Path, stage: int, ranks: int, scope: str, exchange: str
) -> None:
    settings = (*COMMON, f"objective.association.scope={scope}", f"objective.association.exchange={exchange}")
    pooled = ("training.accumulation=2", "training.accumulation_pool=update")
    checkpoint = through_deepspeed(tmp_path, run_config(stage, "sgd", *settings, *pooled), ranks)
    config = run_config(stage, "sgd", *settings)
    assert_equal(checkpoint, plain(config, STEPS), config)
