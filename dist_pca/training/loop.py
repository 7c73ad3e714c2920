"""The training loop."""

import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.config import RunConfig
from dist_pca.data.batch import Batch
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.classes import class_table
from dist_pca.data.order import micro_batch_size
from dist_pca.data.randomness import Domain as DomainName
from dist_pca.data.randomness import Purpose, draw
from dist_pca.data.sampling import build_sampler
from dist_pca.data.stream import stream
from dist_pca.data.transfer import to_device
from dist_pca.data.transform import check_crop
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.objective import Domain, objective
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.manifest import Manifest
from dist_pca.training.accumulation import one_loss, separate_losses
from dist_pca.training.bad_steps import BadSteps, finite
from dist_pca.training.checkpoint import latest_checkpoint, load_average, load_model, load_optimizer, read_state
from dist_pca.training.checkpoint_writer import CheckpointWriter
from dist_pca.training.ema import Average, start_average, update_average
from dist_pca.training.engine import World, connect_store, reconcile_launcher, start_world
from dist_pca.training.lock import run_lock
from dist_pca.training.loss_scale import LossScale
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.outcome import ExitCode, forget_outcome
from dist_pca.training.phases import PhaseClock
from dist_pca.training.rank_statistics import load_statistics
from dist_pca.training.resume import check_resume
from dist_pca.training.run import create_run
from dist_pca.training.schedule import learning_rate_factor
from dist_pca.training.signals import StopRequest
from dist_pca.training.telemetry import Telemetry
from dist_pca.training.throughput import network_flops
from dist_pca.training.trackers import check_trackers
from dist_pca.training.validation import open_validation, validate
from dist_pca.training.watchdog import Watchdog


class Plan(NamedTuple):
    """What a run needs, once all of it is known to be there and to fit together."""

    config: RunConfig
    sources: tuple[Manifest, ...]
    targets: tuple[Manifest, ...]
    """None where the run does not adapt."""
    validation: Manifest | None
    classes: tuple[ClassInfo, ...]
    model: Segmenter


def check(config: RunConfig, *, world_size: int, resume: bool | None) -> Plan:
    """Everything that can be refused before a process group exists: launcher, data, classes, sizes, network, folder.

    Raises:
        UserError: something does not fit.
    """
    reconcile_launcher(config)
    cache = cache_settings(config.data.cache)
    sources = tuple(open_manifest(folder, cache) for folder in config.data.folders("source"))
    targets = tuple(open_manifest(folder, cache) for folder in config.data.folders("target") if config.objective.adapt)
    classes = class_table(config.data, sources, targets)
    batches = {
        "training.source_batch": (sources, config.training.source_batch),
        "training.target_batch": (targets, config.training.target_batch),
    }
    for key, (manifests, batch) in batches.items():
        for manifest in manifests:
            micro_batch_size(batch, world_size=world_size, accumulation=config.training.accumulation, key=key)
            check_crop(manifest, config.data.shorter_edge, config.data.crop)
    build_sampler(config.data, sources, "source", config.seed, targets=targets)
    check_resume(config, resume)
    check_trackers(config)
    validation = open_validation(config, classes)
    torch.manual_seed(config.seed)
    return Plan(config, sources, targets, validation, classes, build_segmenter(config.model, len(classes)))


def train(plan: Plan, stop: StopRequest) -> ExitCode:
    """Train from the run folder's newest checkpoint, or from the start, to the last step or until asked to stop.

    Collective.

    Raises:
        UserError: a shard or a checkpoint cannot be read or written, or too many steps in a row went wrong.
    """
    config, training = plan.config, plan.config.training
    stop.limit(training.time_limit, os.environ)
    world = start_world(config)
    with ExitStack() as stack:
        watchdog = stack.enter_context(
            Watchdog(connect_store(), world.rank, world.size, timeout=training.stall_timeout, folder=config.folder)
        )
        stack.enter_context(run_lock(config.folder))
        flops = network_flops(plan.model, *config.data.crop)
        engine, optimizer, average, state = _start_engine(plan, world)
        start_step = int(state["step"])
        base_rates = [group["lr"] for group in optimizer.param_groups]
        if world.rank == 0:
            create_run(config, plan.classes, world.size, start_step)
            forget_outcome(config.folder)
        dist.barrier()
        clock = stack.enter_context(PhaseClock(watchdog, world.device))
        telemetry = stack.enter_context(
            Telemetry(
                config,
                plan.classes,
                clock,
                device=world.device,
                start_step=start_step,
                flops=flops,
                windows=state["windows"],
            )
        )
        sources = stack.enter_context(
            closing(_stream(plan, plan.sources, "source", training.source_batch, world, start_step))
        )
        targets = (
            repeat(None)
            if not plan.targets
            else stack.enter_context(
                closing(_stream(plan, plan.targets, "target", training.target_batch, world, start_step))
            )
        )
        bad_steps = BadSteps(engine.module, config.folder, training.max_bad_steps)
        loss_scale = LossScale(engine, enabled=training.precision == "fp16", state=state)
        checkpoints = stack.enter_context(
            CheckpointWriter(
                config.folder / "checkpoints", seed=config.seed, keep=training.keep_checkpoints, device=world.device
            )
        )

        def next_batch(step: int) -> tuple[Batch, Batch | None]:
            clock.enter("data", step + 1)
            return next(sources), next(targets)

        def forward_batch(batch: tuple[Batch, Batch | None]) -> tuple[Domain, Domain | None]:
            clock.enter("forward")
            return forward(engine, *batch, joint=config.model.joint_batch, seed=config.seed)

        def loss_of(step: int, domains: tuple[Domain, Domain | None]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            source, target = domains
            return objective(
                config.objective,
                finite(source),
                None if target is None else finite(target),
                step=step,
                accumulation=losses,
                node=world.node,
            )

        pooled = training.accumulation_pool == "update" and training.accumulation > 1
        losses = 1 if pooled else training.accumulation
        micro_batches = partial(
            partial(one_loss, module=engine.module) if pooled else separate_losses, count=training.accumulation
        )

        for step in range(start_step, training.steps):
            factor = learning_rate_factor(config, step)
            for group, base in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = base * factor
            # Dropout draws anew from (seed, step, rank), so that no generator state has to be stored.
            torch.manual_seed(hash((config.seed, step, world.rank)) % 2**63)
            bad_steps.begin()
            for micro in micro_batches(partial(next_batch, step), forward_batch, partial(loss_of, step)):
                clock.enter("backward")
                engine.backward(bad_steps.watch(micro.loss, micro.terms, micro.domains, micro.batch))
                clock.enter("optimizer")
                engine.step()
                telemetry.collect(micro.terms, micro.batch)
            norm = float(engine.get_global_grad_norm() or 0.0)
            skipped = bad_steps.end(step + 1, norm, excused=loss_scale.update(norm))
            if average is not None and not skipped:
                update_average(average, engine, training.ema_decay, step + 1)
            mean_iou, last = None, step + 1 == training.steps
            every = training.validate_every or training.checkpoint_every
            if plan.validation is not None and ((step + 1) % every == 0 or last):
                clock.enter("validation")
                mean_iou = validate(
                    engine,
                    average,
                    plan.validation,
                    plan.classes,
                    config,
                    rank=world.rank,
                    world_size=world.size,
                    progress=partial(clock.enter, "validation"),
                )
                telemetry.collect({"validation_mean_iou": torch.tensor(mean_iou, device=world.device)}, ())
            clock.enter("log")
            telemetry.step(
                step + 1,
                {"learning_rate": config.optimizer.lr * factor, "gradient_norm": None if skipped else norm},
                skipped=skipped,
            )
            stopping = stop.agree(step + 1, world.device)
            checkpoints.poll()
            if (step + 1) % training.checkpoint_every == 0 or last or stopping or mean_iou is not None:
                clock.enter("checkpoint")
                checkpoints.save(
                    engine,
                    step + 1,
                    average=average,
                    state={"mean_iou": mean_iou, "windows": telemetry.window(), **loss_scale.state},
                )
            if stopping and step + 1 < training.steps:
                return stop.exit_code
    return ExitCode.DONE


def forward(
    engine: Any, source: Batch, target: Batch | None, *, joint: bool, seed: int
) -> tuple[Domain, Domain | None]:
    """Both domains through the network, as one batch or in turn."""
    seeds = _seeds(source, seed, "source")
    if target is None:
        logits, features = engine(source.images)
        return Domain(logits, features, source.labels, seeds), None
    target_seeds = _seeds(target, seed, "target")
    if joint:
        n = len(source.images)
        logits, features = engine(torch.cat([source.images, target.images]))
        (logits, target_logits), (features, target_features) = ((x[:n], x[n:]) for x in (logits, features))
    else:
        (logits, features), (target_logits, target_features) = engine(source.images), engine(target.images)
    return (
        Domain(logits, features, source.labels, seeds),
        Domain(target_logits, target_features, target.labels, target_seeds),
    )


def _seeds(batch: Batch, seed: int, domain: DomainName) -> list[int]:
    # A function of each crop's place in the stream, so that every number of ranks picks the same positions.
    return [int(draw(1, seed, domain, Purpose.POSITIONS, place)[0] >> 1) for place in batch.positions]


def _start_engine(plan: Plan, world: World) -> tuple[Any, torch.optim.Optimizer, Average | None, dict[str, Any]]:
    config = plan.config
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    if checkpoint is not None:
        load_model(plan.model, checkpoint)
    engine, optimizer = world.accelerator.prepare(plan.model, build_optimizer(config.optimizer, plan.model))
    if checkpoint is not None:
        load_optimizer(engine, checkpoint)
    average = None
    if config.training.ema_decay > 0:
        average = start_average(engine, None if checkpoint is None else load_average(checkpoint))
    if checkpoint is not None:
        load_statistics(engine, average, checkpoint)
    engine.train()
    return engine, optimizer, average, {"step": 0, "windows": []} if checkpoint is None else read_state(checkpoint)


def _stream(
    plan: Plan, manifests: Sequence[Manifest], domain: DomainName, global_batch: int, world: World, start_step: int
) -> Generator[Batch, None, None]:
    batches = stream(
        plan.config.data,
        manifests,
        domain,
        seed=plan.config.seed,
        rank=world.rank,
        world_size=world.size,
        global_batch=global_batch,
        accumulation=plan.config.training.accumulation,
        start_step=start_step,
        targets=plan.targets,
    )
    return to_device(batches, world.device)
