"""The training loop."""

import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.config import RunConfig
from dist_pca.data.classes import class_table
from dist_pca.data.order import micro_batch_size
from dist_pca.data.stream import Batch, stream
from dist_pca.data.transform import check_crop
from dist_pca.errors import UserError
from dist_pca.model.segmenter import build_segmenter
from dist_pca.objective import Domain, objective
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.manifest import Manifest, load_manifest
from dist_pca.training.checkpoint import latest_checkpoint, load_model, load_optimizer, read_step, save_checkpoint
from dist_pca.training.engine import World, reconcile_launcher, start_world
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.run import create_run
from dist_pca.training.schedule import learning_rate_factor
from dist_pca.training.telemetry import Telemetry


class Plan(NamedTuple):
    """What a run needs, once all of it is known to be there and to fit together."""

    config: RunConfig
    source: Manifest
    target: Manifest | None
    classes: tuple[ClassInfo, ...]


def check(config: RunConfig, *, world_size: int, resume: bool) -> Plan:
    """Everything that can be refused before a process group exists: data, classes, sizes, launcher, run folder.

    Raises:
        UserError: something does not fit.
    """
    reconcile_launcher(config)
    source = load_manifest(config.data.source)
    if not source.labelled:
        raise UserError(f"data.source: {source.folder} has no labels; build it without --unlabelled")
    target = load_manifest(config.data.target) if config.objective.adapt and config.data.target else None
    classes = class_table(config.data, source, target)
    batches = {
        "training.source_batch": config.training.source_batch,
        "training.target_batch": config.training.target_batch,
    }
    for manifest, (key, batch) in zip((source, target), batches.items(), strict=True):
        if manifest is not None:
            micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
            check_crop(manifest, config.data.shorter_edge, config.data.crop)
    if not resume and latest_checkpoint(config.folder / "checkpoints") is not None:
        raise UserError(f"{config.folder}: already holds a run; add --resume to go on with it, or choose another name=")
    return Plan(config, source, target, classes)


def train(plan: Plan) -> None:
    """Train from the run folder's newest checkpoint, or from the start, to the last step. Collective."""
    config = plan.config
    world = start_world(config)
    engine, optimizer, start_step = _start_engine(plan, world)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    if world.rank == 0:
        create_run(config, plan.classes, world.size)
    dist.barrier()

    training = config.training
    images = training.source_batch + (training.target_batch if plan.target else 0)
    with (
        closing(_stream(plan, "source", world, start_step)) as sources,  # type: ignore[type-var]
        closing(_stream(plan, "target", world, start_step)) as targets,  # type: ignore[type-var]
        Telemetry(
            config.folder,
            plan.classes,
            steps=training.steps,
            start_step=start_step,
            log_every=training.log_every,
            images=images,
        ) as telemetry,
    ):
        for step in range(start_step, training.steps):
            factor = learning_rate_factor(config, step)
            for group, base in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = base * factor
            # Dropout draws anew from (seed, step, rank), so that no generator state has to be stored.
            torch.manual_seed(hash((config.seed, step, world.rank)) % 2**63)
            for _ in range(training.accumulation):
                source, target = forward(engine, next(sources), next(targets), config.model.joint_batch, world.device)
                loss, terms = objective(
                    config.objective, source, target, step=step, accumulation=training.accumulation, node=world.node
                )
                engine.backward(loss)
                engine.step()
                telemetry.collect(terms)
            norm = engine.get_global_grad_norm()
            telemetry.step(
                step + 1, {"learning_rate": config.optimizer.lr * factor, "gradient_norm": float(norm or 0.0)}
            )
            if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
                save_checkpoint(
                    engine, config.folder / "checkpoints", step + 1, seed=config.seed, keep=training.keep_checkpoints
                )


def forward(
    engine: Any, source: Batch, target: Batch | None, joint: bool, device: torch.device
) -> tuple[Domain, Domain | None]:
    """Both domains through the network, as one batch or in turn."""
    source_images = source.images.to(device, non_blocking=True)
    source_labels = None if source.labels is None else source.labels.to(device, non_blocking=True)
    if target is None:
        return Domain(*engine(source_images), source_labels), None
    target_images = target.images.to(device, non_blocking=True)
    target_labels = None if target.labels is None else target.labels.to(device, non_blocking=True)
    if joint:
        logits, features = engine(torch.cat([source_images, target_images]))
        split = [len(source_images), len(target_images)]
        (source_logits, target_logits), (source_features, target_features) = logits.split(split), features.split(split)
    else:
        source_logits, source_features = engine(source_images)
        target_logits, target_features = engine(target_images)
    return (
        Domain(source_logits, source_features, source_labels),
        Domain(target_logits, target_features, target_labels),
    )


def _start_engine(plan: Plan, world: World) -> tuple[Any, torch.optim.Optimizer, int]:
    config = plan.config
    torch.manual_seed(config.seed)
    model = build_segmenter(config.model, len(plan.classes))
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    if checkpoint is not None:
        load_model(model, checkpoint)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, optimizer = world.accelerator.prepare(model, build_optimizer(config.optimizer, model))
    if checkpoint is not None:
        load_optimizer(engine, checkpoint)
    engine.train()
    return engine, optimizer, 0 if checkpoint is None else read_step(checkpoint)


def _stream(plan: Plan, domain: str, world: World, start_step: int) -> Iterator[Batch | None]:
    manifest = plan.source if domain == "source" else plan.target
    if manifest is None:
        return _nothing()
    training = plan.config.training
    return stream(
        plan.config.data,
        manifest,
        domain,  # type: ignore[arg-type]
        seed=plan.config.seed,
        rank=world.rank,
        world_size=world.size,
        global_batch=training.source_batch if domain == "source" else training.target_batch,
        accumulation=training.accumulation,
        start_step=start_step,
    )


def _nothing() -> Iterator[None]:
    while True:
        yield None
