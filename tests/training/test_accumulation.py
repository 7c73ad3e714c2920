"""Micro-batches that share one loss make the update of the bigger batch, on any number of ranks and at any scope."""

import json
import re
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.objective import Domain, Domains
from dist_pca.tools.bench.resume import draw_streets, train_to_the_end
from dist_pca.training.accumulation import Loss, fit_accumulation, grad_cache
from tests.training.zero_runs import STEPS, Trained, assert_equal, network, plain, run_config, through_deepspeed

FREE_OF_BATCH_STATISTICS = ("model.batch_norm=frozen",)
COMMON = ("training.source_batch=8", "training.target_batch=8", *FREE_OF_BATCH_STATISTICS)


def apart(one: Trained, other: Trained) -> float:
    """How far two trainings end from each other, in units of how far they went."""
    start = dict(network(run_config(2, "sgd", *COMMON)).named_parameters())
    distance = torch.cat([(value - other[0][name]).flatten() for name, value in one[0].items()]).norm()
    moved = torch.cat([(start[name] - value).flatten() for name, value in other[0].items()]).norm()
    return float((distance / moved).detach())


@cache
def whole_batch(*settings: str) -> Trained:
    """Two updates of one process that passes whole batches."""
    return plain(run_config(2, "sgd", *settings), 2)


@pytest.mark.parametrize("scope", ["pair", "world"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_loss_over_micro_batches_is_that_of_the_bigger_batch(scope: str, accumulation: int) -> None:
    settings = (*COMMON, f"objective.association.scope={scope}")
    pooled = run_config(2, "sgd", *settings, f"training.accumulation={accumulation}", "training.grad_cache=true")
    assert apart(plain(pooled, 2), whole_batch(*settings)) < 1e-4


def test_separate_losses_are_not_the_bigger_batchs_where_labels_and_cycles_are_shared_out_unevenly() -> None:
    separate = plain(run_config(2, "sgd", *COMMON, "training.accumulation=4"), 2)
    assert apart(separate, whole_batch(*COMMON)) > 1e-2


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
        plain(run_config(2, "sgd", *settings, *still, f"training.grad_cache={cached}", "training.ema_decay=0"), 1)[1]
        for cached in (False, True)
    )
    torch.testing.assert_close(pooled, separate, rtol=0, atol=1e-12)


PER_RANK = (("", "null"), ("_per_rank", 2))
"""Values of the two keys for a batch."""


def test_the_first_passs_outputs_are_freed_before_the_second_pass() -> None:
    weight = torch.nn.Linear(3, 3)
    alive: list[weakref.ref[torch.Tensor]] = []

    def forward(images: torch.Tensor) -> Domains:
        logits = weight(images)
        alive.append(weakref.ref(logits))
        return Domains(Domain(logits, logits * 2, None))

    def loss_of(domains: Domains) -> Loss:
        alive.append(weakref.ref(domains.source.logits))
        loss = domains.source.logits.square().sum() + domains.source.features.sum()
        return loss, {"loss": loss}

    micro_batches = grad_cache(lambda: torch.ones(2, 3), forward, loss_of, 2, weight)
    next(micro_batches)
    *first_pass, second = [reference() for reference in alive]
    assert first_pass == [None] * 3
    assert second is not None


@cache
def template(adapt: bool) -> RunConfig:
    limit = ("training.grad_cache=true", "training.max_micro_batch=1")
    return run_config(2, "sgd", *limit, f"objective.adapt={str(adapt).lower()}")


def batches(source: int, target: int, largest: int, *, adapt: bool = True) -> RunConfig:
    sizes = {"source_batch": source, "target_batch": target, "max_micro_batch": largest}
    return template(adapt).model_copy(update={"training": template(adapt).training.model_copy(update=sizes)})


@given(
    ranks=st.integers(1, 8), source=st.integers(1, 12), target=st.integers(1, 12), largest=st.integers(1, 12), adapt=...
)
def test_accumulation_is_the_least_that_keeps_micro_batches_small_enough(
    ranks: int, source: int, target: int, largest: int, adapt: bool
) -> None:
    config = batches(ranks * source, ranks * target, largest, adapt=adapt)
    images = (source, target) if adapt else (source,)
    suiting = [n for n in range(1, 13) if all(count % n == 0 and count // n <= largest for count in images)]
    if suiting:
        fitted = fit_accumulation(config, ranks)
        assert fitted.training.accumulation == suiting[0]
        assert fitted.batches == config.batches
    else:
        with pytest.raises(UserError, match=r"training\.max_micro_batch: .*; use (\d+) or more") as refused:
            fit_accumulation(config, ranks)
        enough = int(re.findall(r"use (\d+) or", str(refused.value))[0])
        fit_accumulation(batches(ranks * source, ranks * target, enough), ranks)


def test_a_batch_that_ranks_cannot_share_is_refused_with_sizes_that_they_can() -> None:
    with pytest.raises(UserError, match=r"training\.source_batch: 8 samples .*; use 6 or 9 samples or a world"):
        fit_accumulation(batches(8, 8, 2), 3)


def test_a_ranks_batch_that_its_micro_batches_cannot_share_is_refused() -> None:
    sizes = ("training.source_batch=null", "training.source_batch_per_rank=3", "training.accumulation=2")
    with pytest.raises(UserError, match=r"training\.source_batch_per_rank: 3 samples .*training\.accumulation=2"):
        fit_accumulation(run_config(2, "sgd", *sizes, "objective.adapt=false"), 4)


def test_a_limit_without_one_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_micro_batch: .*; set training.grad_cache=true too"):
        run_config(2, "sgd", "training.max_micro_batch=2")


@pytest.mark.slow
def test_a_run_goes_on_with_its_batch_on_fewer_ranks_of_the_same_memory(tmp_path: Path) -> None:
    draw_streets(tmp_path)
    settings = {
        "training__max_micro_batch": 2,
        "training__grad_cache": "true",
        "model__batch_norm": "frozen",
        "schedule__horizon": 8,
        # Matches of an untrained network nearly tie, and rounding decides some; the weight makes them count little.
        "objective__association__levels": "[features]",
        "objective__association__weight": "1e-6",
        "optimizer__epsilon": 1e-3,
        "optimizer__lr": 5e-5,
        "telemetry__sample_keys": "true",
        "data__sampling__source": "uniform",
        "objective__cross_entropy__class_weights": "null",
    }
    train_to_the_end(tmp_path, "steady", 6, 2, **settings)
    train_to_the_end(tmp_path, "moving", 3, 2, **settings)
    train_to_the_end(tmp_path, "moving", 6, 1, **settings)
    runs = [tmp_path / name for name in ("steady", "moving")]
    assert [load_config(run / "config.yaml").training.accumulation for run in runs] == [1, 2]
    samples = [(run / "samples.jsonl").read_text() for run in runs]
    assert samples[0] == samples[1]
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_with_a_batch_for_each_rank_goes_on_with_it_and_with_the_next_samples_on_fewer_ranks(
    tmp_path: Path,
) -> None:
    draw_streets(tmp_path)
    per_rank = {f"training__{domain}_batch{key}": n for domain in ("source", "target") for key, n in PER_RANK}
    settings = {"telemetry__sample_keys": "true", "model__batch_norm": "frozen", "schedule__horizon": 8}
    train_to_the_end(tmp_path, "steady", 6, 2, **settings)
    train_to_the_end(tmp_path, "moving", 2, 2, **settings, **per_rank)
    train_to_the_end(tmp_path, "moving", 6, 1, **settings, **per_rank)
    training = load_config(tmp_path / "moving" / "config.yaml").training
    assert training.source_batch_per_rank == training.target_batch_per_rank == 2

    def used(name: str, domain: str) -> list[str]:
        lines = map(json.loads, (tmp_path / name / "samples.jsonl").read_text().splitlines())
        return [key for line in lines for key in line[domain]]

    for domain in ("source", "target"):
        assert len(used("moving", domain)) == 2 * 4 + 4 * 2
        assert used("moving", domain) == used("steady", domain)[:16]


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
    settings = (*COMMON, f"objective.association.scope={scope}", f"objective.association.communication={exchange}")
    pooled = ("training.accumulation=2", "training.grad_cache=true")
    checkpoint = through_deepspeed(tmp_path, run_config(stage, "sgd", *settings, *pooled), ranks)
    config = run_config(stage, "sgd", *settings)
    assert_equal(checkpoint, plain(config, STEPS), config)
