"""DeepSpeed's ZeRO stages, through Accelerate, are plain PyTorch on one process; state moves between them."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dist_pca.config import RunConfig, load_config
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective import Domain, objective
from dist_pca.resources import resource
from dist_pca.training.optimizer import build_optimizer

STEPS, CLASSES = 3, 5


def run_config(stage: int, optimizer: str, *overrides: str) -> RunConfig:
    return load_config(
        resource("configs", "demo"),
        [
            "model.backbone=test_resnet",
            "model.weights=scratch",
            "model.output_stride=null",
            "model.batch_norm=sync",
            "model.head_channels=16",
            "objective.association.start_step=0",
            "objective.association.ramp_steps=0",
            f"optimizer.name={optimizer}",
            "optimizer.lr=1e-3",
            # At adamw's usual 1e-8 a first update is the sign of the gradient: where that is zero but for rounding (a
            # convolution's bias before a norm), two equal computations would move the weight apart by twice the rate.
            "optimizer.epsilon=1e-3",
            "training.source_batch=4",
            "training.target_batch=4",
            f"training.zero_stage={stage}",
            *overrides,
        ],
    )


def network(config: RunConfig) -> Segmenter:
    """The same weights on every rank, with logits far enough apart that contrast normalisation does not divide by
    a deviation near zero: rounding would grow from step to step."""
    torch.manual_seed(0)
    model = build_segmenter(config.model, CLASSES)
    with torch.no_grad():
        model.head.classifier.weight.mul_(30)  # type: ignore[operator, union-attr]
    return model


def batch(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (2 * size, 3, 64, 64), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (size, 64, 64), generator=generator)
    # Images differ in how much of them is labelled, so that a budget of labelled positions is not the same for all.
    for index, label in enumerate(labels):
        label[: 8 * index % 40] = 255
    return images, labels


def loss_of(
    model: Any, config: RunConfig, step: int, rank: int, ranks: int, micro: int, accumulation: int
) -> torch.Tensor:
    total = config.training.source_batch
    images, labels = batch(step, total)
    size = total // (ranks * accumulation)
    first = micro * size * ranks + rank * size
    own = slice(first, first + size)
    logits, features = model(torch.cat([images[:total][own], images[total:][own]]))
    seeds = range(first, first + size)
    source = Domain(logits[:size], features[:size], labels[own], seeds)
    target = Domain(logits[size:], features[size:], None, seeds)
    return objective(config.objective, source, target, step=step)[0]


def plain(config: RunConfig, steps: int) -> dict[str, torch.Tensor]:
    """One process, no DeepSpeed."""
    accumulation = config.training.accumulation
    model = network(config)
    optimizer = build_optimizer(config.optimizer, model)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulation):
            (loss_of(model, config, step, 0, 1, micro, accumulation) / accumulation).backward()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def engine_steps(
    rank: int, ranks: int, port: int, folder: Path, config: RunConfig, first: int, last: int, load: str
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from dist_pca.training.checkpoint import load_model, load_optimizer, save_checkpoint
    from dist_pca.training.engine import start_world
    from dist_pca.training.zero import full_parameters

    world = start_world(config)
    torch.set_num_threads(1)
    model = network(config)
    if load:
        load_model(model, folder / load / f"step-{first:08d}")
    engine, _ = world.accelerator.prepare(model, build_optimizer(config.optimizer, model))
    if load:
        load_optimizer(engine, folder / load / f"step-{first:08d}")
    for step in range(first, last):
        for micro in range(config.training.accumulation):
            engine.backward(loss_of(engine, config, step, rank, ranks, micro, config.training.accumulation))
            engine.step()
    parameters = full_parameters(engine)
    save_checkpoint(engine, folder / f"stage{config.training.zero_stage}", last, seed=0, keep=5)
    if rank == 0:
        torch.save(parameters, folder / "parameters.pt")


def through_deepspeed(
    folder: Path, config: RunConfig, ranks: int, first: int = 0, last: int = STEPS, load: str = ""
) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(engine_steps, (ranks, port, folder, config, first, last, load), nprocs=ranks)
    parameters: dict[str, torch.Tensor] = torch.load(folder / "parameters.pt", weights_only=True)
    return parameters


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], config: RunConfig) -> None:
    """Equal to 1e-5, and to far less than training has moved the parameters."""
    start = dict(network(config).named_parameters())
    assert found.keys() == expected.keys()
    apart = torch.cat([(found[name] - value).flatten() for name, value in expected.items()]).norm()
    moved = torch.cat([(start[name].detach() - value).flatten() for name, value in expected.items()]).norm()
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    assert apart < 1e-5 * torch.cat([value.flatten() for value in expected.values()]).norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "optimizer"),
    [(1, 2, "sgd"), (2, 2, "sgd"), (3, 2, "sgd"), (2, 1, "sgd"), (2, 4, "sgd"), (3, 2, "adamw")],
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
        (1, 1, "world", "gather"),
        (1, 2, "world", "gather"),
        (2, 3, "world", "ring"),
        (3, 4, "world", "ring"),
        (3, 3, "node", "gather"),
        (1, 4, "node", "ring"),
        # With one image on each rank the paper's pairs are the ranks' pools.
        (2, 4, "rank", "auto"),
        (3, 2, "pair", "auto"),
    ],
)
def test_every_scope_and_exchange_trains_as_one_process_does(
    tmp_path: Path, stage: int, ranks: int, scope: str, exchange: str
) -> None:
    images = ranks if scope == "rank" else 2 * ranks
    common = [
        f"training.source_batch={images}",
        f"training.target_batch={images}",
        "objective.association.position_budget=48",
        "objective.association.position_sampling=balanced",
        f"objective.association.exchange={exchange}",
    ]
    config = run_config(stage, "sgd", *common, f"objective.association.scope={scope}")
    alone = run_config(
        stage, "sgd", *common, f"objective.association.scope={'pair' if scope in ('rank', 'pair') else 'world'}"
    )
    assert_equal(through_deepspeed(tmp_path, config, ranks), plain(alone, STEPS), config)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_accumulated_micro_batches_train_as_in_one_process(tmp_path: Path, exchange: str) -> None:
    config = run_config(2, "sgd", "training.accumulation=2", f"objective.association.exchange={exchange}")
    assert_equal(through_deepspeed(tmp_path, config, 2), plain(config, STEPS), config)


@pytest.mark.slow
def test_clipping_is_that_of_one_plain_process(tmp_path: Path) -> None:
    config = run_config(2, "sgd", "optimizer.clip_norm=0.05")
    assert_equal(through_deepspeed(tmp_path, config, 2), plain(config, STEPS), config)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_goes_on_under_another_stage_and_world_size(tmp_path: Path, optimizer: str) -> None:
    through_deepspeed(tmp_path, run_config(2, optimizer), 2, last=2)
    through_deepspeed(tmp_path, run_config(3, optimizer), 4, first=2, last=3, load="stage2")
    found = through_deepspeed(tmp_path, run_config(1, optimizer), 1, first=3, last=4, load="stage3")
    config = run_config(1, optimizer)
    assert_equal(found, plain(config, 4), config)
