"""The training loop."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dist_pca.data.batch import Batch
from dist_pca.data.randomness import Domain as DomainName
from dist_pca.data.randomness import Purpose, draw
from dist_pca.objective import Domain, objective
from dist_pca.training.accumulation import Domains, Loss, MicroBatch, one_loss, separate_losses
from dist_pca.training.bad_steps import finite
from dist_pca.training.check import Plan
from dist_pca.training.ema import update_average
from dist_pca.training.outcome import ExitCode
from dist_pca.training.schedule import learning_rate_factor
from dist_pca.training.session import Session, open_session
from dist_pca.training.signals import StopRequest
from dist_pca.training.validation import validate


def train(plan: Plan, stop: StopRequest) -> ExitCode:
    """Train from the run folder's newest checkpoint, or from the start, to the last step or until asked to stop.

    Collective.

    Raises:
        UserError: a shard or a checkpoint cannot be read or written, or too many steps in a row went wrong.
    """
    config, training = plan.config, plan.config.training
    stop.limit(training.time_limit, os.environ)
    with open_session(plan) as session:
        engine, clock, telemetry = session.engine, session.clock, session.telemetry
        for step in range(session.start_step, training.steps):
            factor = learning_rate_factor(config, step)
            for group, base in zip(session.optimizer.param_groups, session.base_rates, strict=True):
                group["lr"] = base * factor
            # Dropout draws anew from (seed, step, rank), so that no generator state has to be stored.
            torch.manual_seed(hash((config.seed, step, session.world.rank)) % 2**63)
            session.bad_steps.begin()
            for micro in micro_batches(session, plan, step):
                clock.enter("backward")
                engine.backward(session.bad_steps.watch(micro.loss, micro.terms, micro.domains, micro.batch))
                clock.enter("optimizer")
                engine.step()
                telemetry.collect(micro.terms, micro.batch)
            norm = float(engine.get_global_grad_norm() or 0.0)
            skipped = session.bad_steps.end(step + 1, norm, excused=session.loss_scale.update(norm))
            if session.average is not None and not skipped:
                update_average(session.average, engine, training.ema_decay, step + 1)
            last = step + 1 == training.steps
            mean_iou = score(session, plan, step + 1, last=last)
            clock.enter("log")
            telemetry.step(
                step + 1,
                {
                    "learning_rate": config.optimizer.lr * factor,
                    "gradient_norm": None if skipped else norm,
                    "loss_scale": session.loss_scale.value,
                },
                skipped=skipped,
            )
            stopping = stop.agree(step + 1, session.world.device)
            session.checkpoints.poll()
            if (step + 1) % training.checkpoint_every == 0 or last or stopping or mean_iou is not None:
                clock.enter("checkpoint")
                session.checkpoints.save(
                    engine,
                    step + 1,
                    average=session.average,
                    state={"mean_iou": mean_iou, "windows": telemetry.window(), **session.loss_scale.state},
                )
            if stopping and not last:
                return stop.exit_code
    return ExitCode.DONE


def micro_batches(session: Session, plan: Plan, step: int) -> Iterator[MicroBatch[tuple[Batch, Batch | None]]]:
    """The micro-batches of a step (from 0), through the network and ready for backward."""
    config, training = plan.config, plan.config.training
    pooled = training.accumulation_pool == "update" and training.accumulation > 1

    def next_batch() -> tuple[Batch, Batch | None]:
        session.clock.enter("data", step + 1)
        return next(session.sources), next(session.targets)

    def forward_batch(batch: tuple[Batch, Batch | None]) -> Domains:
        session.clock.enter("forward")
        return forward(session.engine, *batch, joint=config.model.joint_batch, seed=config.seed)

    def loss_of(domains: Domains) -> Loss:
        source, target = domains
        return objective(
            config.objective,
            finite(source),
            None if target is None else finite(target),
            step=step,
            accumulation=1 if pooled else training.accumulation,
            node=session.world.node,
        )

    if pooled:
        return one_loss(next_batch, forward_batch, loss_of, training.accumulation, session.engine.module)
    return separate_losses(next_batch, forward_batch, loss_of, training.accumulation)


def score(session: Session, plan: Plan, step: int, *, last: bool) -> float | None:
    """Mean IoU on the validation shards after a step (from 1) that is to be scored, else None. Collective."""
    training = plan.config.training
    if plan.validation is None or not (last or step % (training.validate_every or training.checkpoint_every) == 0):
        return None
    session.clock.enter("validation")
    mean_iou = validate(
        session.engine,
        session.average,
        plan.validation,
        plan.classes,
        plan.config,
        rank=session.world.rank,
        world_size=session.world.size,
        progress=partial(session.clock.enter, "validation"),
    )
    session.telemetry.collect({"validation_mean_iou": torch.tensor(mean_iou, device=session.world.device)}, ())
    return mean_iou


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
