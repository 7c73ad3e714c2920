"""A few steps of a small network, through DeepSpeed on several ranks and without it on one."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file

from dist_pca.config import RunConfig, load_config
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective import Domain, Domains, objective
from dist_pca.resources import resource
from dist_pca.training.accumulation import MicroBatch, grad_cache, separate_losses
from dist_pca.training.checkpoint import latest_checkpoint
from dist_pca.training.optimizer import build_optimizer
from tests.support.ranks import leave_group

STEPS, CLASSES = 3, 5
Trained = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Parameters, and the moving average of the whole state, by name."""


def run_config(stage: int, optimizer: str, *overrides: str) -> RunConfig:
    return load_config(
        resource("configs", "demo"),
        [
            "model.backbone=test_resnet",
            "model.weights=scratch",
            "model.output_stride=null",
            "model.batch_norm=sync",
            "model.head_channels=16",
            # The plain loop that runs are compared with has no teacher.
            *("objective.self_training.weight=0", "model.running_statistics=all", "training.ema_decay=0"),
            *(f"objective.association.teacher_{part}=false" for part in ("check", "weight", "matches")),
            "objective.association.start_step=0",
            "objective.association.ramp_steps=0",
            f"optimizer.name={optimizer}",
            "optimizer.lr=1e-3",
            # At adamw's usual 1e-8 a first update is the sign of the gradient: where that is zero but for rounding (a
            # convolution's bias before a norm), two equal computations would move the weight apart by twice the rate.
            "optimizer.epsilon=1e-3",
            "training.source_batch=4",
            "training.target_batch=4",
            # Nothing is left to a launcher, as there is none.
            *(f"training.zero_stage={stage}", "training.offload.optimizer=none", "training.offload.parameters=none"),
            *overrides,
        ],
    )


def network(config: RunConfig) -> Segmenter:
    """The same weights on every rank, with logits far enough apart that contrast normalisation does not divide by
    a deviation near zero: rounding would grow from step to step."""
    torch.manual_seed(0)
    model = build_segmenter(config.model, CLASSES)
    # Not all of a network need train.
    next(model.parameters()).requires_grad_(False)
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


def micro_batches(model: Any, config: RunConfig, step: int, rank: int, ranks: int) -> Iterator[MicroBatch[slice]]:
    """This rank's micro-batches of a step; a batch is the images' places among all of the step."""
    training = config.training
    images, labels = batch(step, training.source_batch)
    size = training.source_batch // (ranks * training.accumulation)
    places = iter(range(rank * size, training.source_batch, ranks * size))

    def next_batch() -> slice:
        first = next(places)
        return slice(first, first + size)

    def forward(own: slice) -> Domains:
        source, target = images.split(training.source_batch)
        logits, features, _ = model(torch.cat([source[own], target[own]]))
        seeds = range(own.start, own.stop)
        return Domains(
            Domain(logits[:size], features[:size], labels[own], seeds),
            Domain(logits[size:], features[size:], None, seeds),
        )

    def loss_of(domains: Domains) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return objective(config.objective, *domains, step=step)

    if training.grad_cache:
        return grad_cache(next_batch, forward, loss_of, training.accumulation, getattr(model, "module", model))
    return separate_losses(next_batch, forward, loss_of, training.accumulation)


def plain(config: RunConfig, steps: int) -> Trained:
    """One process, no DeepSpeed."""
    decay = config.training.ema_decay
    model = network(config)
    optimizer = build_optimizer(config.optimizer, model)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for step in range(steps):
        optimizer.zero_grad()
        for micro in micro_batches(model, config, step, 0, 1):
            (micro.loss / config.training.accumulation).backward()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        kept = min(decay, (step + 1) / (step + 2))
        for name, value in model.state_dict().items():
            average[name] = kept * average[name] + (1 - kept) * value if value.is_floating_point() else value.clone()
    return {name: p.detach() for name, p in model.named_parameters()}, average


def engine_steps(
    rank: int, ranks: int, port: int, folder: Path, config: RunConfig, first: int, last: int, load: Path | None
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from dist_pca.training.checkpoint import CheckpointWriter
    from dist_pca.training.checkpoint_loading import load_model
    from dist_pca.training.checkpoint_parts import checkpoint_parts, restore
    from dist_pca.training.ema import init_ema, update_ema
    from dist_pca.training.environment import init_distributed
    from dist_pca.training.non_finite import LossScale

    environment = init_distributed(config)
    torch.set_num_threads(1)
    model = network(config)
    if load:
        load_model(model, load)
    engine, _ = environment.accelerator.prepare(model, build_optimizer(config.optimizer, model))
    ema = init_ema(engine) if config.training.ema_decay else None
    parts = checkpoint_parts(engine, ema)
    if load:
        restore(parts, load)
    scale = LossScale(engine, enabled=config.training.precision == "fp16", state={})
    for step in range(first, last):
        overflowed = True
        while overflowed:
            for micro in micro_batches(engine, config, step, rank, ranks):
                engine.backward(micro.loss)
                engine.step()
            overflowed = scale.update(float(engine.get_global_grad_norm()))
        if ema:
            update_ema(ema, engine, config.training.ema_decay, step + 1)
    with CheckpointWriter(folder, config, device=environment.device) as checkpoints:
        checkpoints.save(parts, last)
    leave_group()


def through_deepspeed(
    folder: Path, config: RunConfig, ranks: int, first: int = 0, last: int = STEPS, load: Path | None = None
) -> Path:
    """The checkpoint that ranks end with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(engine_steps, (ranks, port, folder, config, first, last, load), nprocs=ranks)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def assert_equal(checkpoint: Path, expected: Trained, config: RunConfig) -> None:
    """Equal to 1e-5, and to far less than training has moved the parameters."""
    start = dict(network(config).named_parameters())
    for part, values in zip(("model", "ema"), expected, strict=True):
        if part == "ema" and not config.training.ema_decay:
            continue
        found = load_file(checkpoint / f"{part}.safetensors")
        assert part == "model" or found.keys() == values.keys()
        apart = torch.cat([(found[name] - value).flatten().float() for name, value in values.items()]).norm()
        moved = torch.cat([(value.detach() - values[name]).flatten() for name, value in start.items()]).norm()
        assert moved > 1e-3
        assert apart < 1e-3 * moved
        assert apart < 1e-5 * torch.cat([value.flatten().float() for value in values.values()]).norm()
