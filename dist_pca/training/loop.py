"""The training loop."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from dist_pca.data.batch import Batch
from dist_pca.model.batch_norm import kept_statistics
from dist_pca.objective import Domains, objective
from dist_pca.training.accumulation import Loss, MicroBatch, one_loss, separate_losses
from dist_pca.training.bad_steps import finite
from dist_pca.training.check import Plan
from dist_pca.training.ema import update_average
from dist_pca.training.outcome import ExitCode
from dist_pca.training.schedule import learning_rate_factor
from dist_pca.training.session import Session, open_session
from dist_pca.training.signals import StopRequest
from dist_pca.training.teacher import teacher_weights
from dist_pca.training.validation import validate
from dist_pca.training.views import Views, see, student_views


class Shown(NamedTuple):
    """A micro-batch as it was read, and as the student is shown it."""

    batches: tuple[Batch, Batch | None]
    """The source's and the target's."""
    views: Views


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
            torch.manual_seed(hash((config.seed, step, session.environment.rank)) % 2**63)
            session.bad_steps.begin()
            for micro in micro_batches(session, plan, step):
                clock.enter("backward")
                engine.backward(session.bad_steps.watch(micro.loss, micro.terms, micro.domains, micro.batch.batches))
                clock.enter("optimizer")
                engine.step()
                telemetry.collect(micro.terms, micro.batch.batches)
                # Before the next one is made.
                del micro
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
            stopping = stop.agree(step + 1, session.environment.device)
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


def micro_batches(session: Session, plan: Plan, step: int) -> Iterator[MicroBatch[Shown]]:
    """The micro-batches of a step (from 0), through the network and ready for backward."""
    config, training = plan.config, plan.config.training
    pooled = training.accumulation_pool == "update" and training.accumulation > 1
    adaptive = config.model.running_statistics == "target"
    keep = partial(kept_statistics, session.engine.module) if adaptive else nullcontext

    def next_batch() -> Shown:
        session.clock.enter("data", step + 1)
        source, target = next(session.sources), next(session.targets)
        session.clock.enter("teacher")
        views = student_views(
            config, source, target, session.engine, partial(as_teacher, session), session.pretrained, step=step
        )
        return Shown((source, target), views)

    def forward(shown: Shown) -> Domains:
        session.clock.enter("forward")
        return see(session.engine, shown.views, joint=config.model.joint_batch, keep_statistics=keep)

    def loss_of(domains: Domains) -> Loss:
        return objective(
            config.objective,
            *(None if domain is None else finite(domain) for domain in domains),  # type: ignore[arg-type]
            step=step,
            accumulation=1 if pooled else training.accumulation,
            node=session.environment.node_group,
            things=plan.things,
        )

    if pooled:
        return one_loss(next_batch, forward, loss_of, training.accumulation, session.engine.module)
    return separate_losses(next_batch, forward, loss_of, training.accumulation)


def as_teacher(session: Session) -> AbstractContextManager[None]:
    """Turn the engine's network into the teacher while the context is open. Collective."""
    assert session.average is not None
    return teacher_weights(session.engine, session.average)


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
        rank=session.environment.rank,
        world_size=session.environment.world_size,
        progress=partial(session.clock.enter, "validation"),
    )
    session.telemetry.collect({"validation_mean_iou": torch.tensor(mean_iou, device=session.environment.device)}, ())
    return mean_iou
