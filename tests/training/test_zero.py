"""DeepSpeed's ZeRO stages, through Accelerate, are plain PyTorch on one process; state moves between them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.zero_runs import STEPS, assert_equal, network, plain, run_config, through_deepspeed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "optimizer"),
    [
        (2, 4, "sgd"),
        (3, 2, "adamw"),
        *(
            pytest.param(stage, ranks, "sgd", marks=pytest.mark.exhaustive)
            for stage, ranks in ((1, 2), (2, 1), (2, 2), (3, 2))
        ),
    ],
)
def test_ranks_under_zero_end_with_the_parameters_of_one_plain_process(
    tmp_path: Path, stage: int, ranks: int, optimizer: str
) -> None:
    config = run_config(stage, optimizer)
    assert_equal(through_deepspeed(tmp_path, config, ranks), plain(config, STEPS), config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "scope", "exchange"),
    [
        pytest.param(1, 1, "world", "gather", marks=pytest.mark.exhaustive),
        (1, 2, "world", "gather"),
        pytest.param(2, 3, "world", "ring", marks=pytest.mark.exhaustive),
        (3, 4, "world", "ring"),
        pytest.param(3, 3, "node", "gather", marks=pytest.mark.exhaustive),
        (1, 4, "node", "ring"),
        # With one image on each rank the paper's pairs are the ranks' candidate sets.
        pytest.param(2, 4, "rank", "auto", marks=pytest.mark.exhaustive),
        pytest.param(3, 2, "pair", "auto", marks=pytest.mark.exhaustive),
    ],
)
def test_every_scope_and_exchange_trains_as_one_process_does(
    tmp_path: Path, stage: int, ranks: int, scope: str, exchange: str
) -> None:
    images = ranks if scope == "rank" else 2 * ranks
    common = [
        f"training.source_batch={images}",
        f"training.target_batch={images}",
        "objective.association.pixel_budget=48",
        "objective.association.pixel_sampling=balanced",
        f"objective.association.communication={exchange}",
    ]
    config = run_config(stage, "sgd", *common, f"objective.association.scope={scope}")
    alone = run_config(
        stage, "sgd", *common, f"objective.association.scope={'pair' if scope in ('rank', 'pair') else 'world'}"
    )
    assert_equal(through_deepspeed(tmp_path, config, ranks), plain(alone, STEPS), config)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [pytest.param("gather", marks=pytest.mark.exhaustive), "ring"])
def test_accumulated_micro_batches_train_as_in_one_process(tmp_path: Path, exchange: str) -> None:
    config = run_config(2, "sgd", "training.accumulation=2", f"objective.association.communication={exchange}")
    assert_equal(through_deepspeed(tmp_path, config, 2), plain(config, STEPS), config)


@pytest.mark.slow
def test_clipping_is_that_of_one_plain_process(tmp_path: Path) -> None:
    config = run_config(2, "sgd", "optimizer.clip_norm=0.05")
    assert_equal(through_deepspeed(tmp_path, config, 2), plain(config, STEPS), config)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.exhaustive)])
def test_a_checkpoint_goes_on_under_another_stage_and_world_size(tmp_path: Path, optimizer: str) -> None:
    checkpoint = through_deepspeed(tmp_path, run_config(2, optimizer), 2, last=2)
    checkpoint = through_deepspeed(tmp_path, run_config(3, optimizer), 4, first=2, last=3, load=checkpoint)
    checkpoint = through_deepspeed(tmp_path, run_config(1, optimizer), 1, first=3, last=4, load=checkpoint)
    config = run_config(1, optimizer)
    assert_equal(checkpoint, plain(config, 4), config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (1, "[stem,layer1]"),
        (3, "[stem,layer1]"),
        pytest.param(2, "[stem,layer1]", marks=pytest.mark.exhaustive),
        pytest.param(1, "[backbone]", marks=pytest.mark.exhaustive),
        pytest.param(2, "[backbone]", marks=pytest.mark.exhaustive),
        (3, "[backbone]"),
    ],
)
def test_frozen_parts_stay_as_they_are_under_every_stage_and_in_the_average(
    tmp_path: Path, stage: int, parts: str
) -> None:
    config = run_config(stage, "sgd", f"model.freeze={parts}", "training.ema_decay=0.9")
    checkpoint = through_deepspeed(tmp_path, config, 2)
    assert_equal(checkpoint, plain(config, STEPS), config)
    before = network(config)
    frozen = {name: value for name, value in before.named_parameters() if not value.requires_grad}
    assert len(frozen) > 5
    for part in ("model", "ema"):
        found = load_file(checkpoint / f"{part}.safetensors")
        assert all(torch.equal(found[name], value) for name, value in frozen.items())
