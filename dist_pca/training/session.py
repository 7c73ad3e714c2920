"""A run under way: processes that have found each other, the engine, streams of data, and who tells and saves."""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.data.batch import Batch
from dist_pca.data.randomness import Domain as DomainName
from dist_pca.data.stream import stream
from dist_pca.data.transfer import to_device
from dist_pca.model.frozen import FrozenBackbone
from dist_pca.shards.manifest import Manifest
from dist_pca.training.bad_steps import BadSteps
from dist_pca.training.check import Plan
from dist_pca.training.checkpoint import latest_checkpoint, load_average, load_model, load_optimizer, read_state
from dist_pca.training.checkpoint_writer import CheckpointWriter
from dist_pca.training.distributed import DistributedEnvironment, connect_store, init_distributed
from dist_pca.training.ema import Average, start_average
from dist_pca.training.lock import run_lock
from dist_pca.training.loss_scale import LossScale
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.outcome import forget_outcome
from dist_pca.training.phases import PhaseClock
from dist_pca.training.rank_statistics import load_statistics
from dist_pca.training.run import create_run
from dist_pca.training.telemetry import Telemetry
from dist_pca.training.throughput import network_flops
from dist_pca.training.watchdog import Watchdog


class Session(NamedTuple):
    """Everything that a step needs."""

    environment: DistributedEnvironment
    engine: Any
    """DeepSpeed's."""
    optimizer: torch.optim.Optimizer
    base_rates: list[float]
    """Learning rate of each of its groups before the schedule."""
    average: Average | None
    """Moving average of the weights, if the run keeps one."""
    pretrained: FrozenBackbone | None
    """The backbone before the first step, where the feature distance asks for it."""
    start_step: int
    """Steps already made."""
    sources: Iterator[Batch]
    targets: Iterator[Batch | None]
    """None for ever where the run does not adapt."""
    clock: PhaseClock
    telemetry: Telemetry
    bad_steps: BadSteps
    loss_scale: LossScale
    checkpoints: CheckpointWriter


@contextmanager
def open_session(plan: Plan) -> Iterator[Session]:
    """Start a run, or take it up at its folder's newest checkpoint. Collective, and so is its end.

    Raises:
        UserError: another job trains in the folder, or a checkpoint cannot be read.
    """
    config, training = plan.config, plan.config.training
    environment = init_distributed(config)
    with ExitStack() as stack:
        watchdog = stack.enter_context(
            Watchdog(
                connect_store(),
                environment.rank,
                environment.world_size,
                timeout=training.stall_timeout,
                folder=config.folder,
            )
        )
        # Ranks of a start that was cut short may still be leaving, on a node that is slow to hear of it.
        again = any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) for name in ("SLURM", "TORCHELASTIC"))
        stack.enter_context(run_lock(config.folder, patience=training.stall_timeout / 2 if again else 0.0))
        flops = network_flops(plan.model, *config.data.crop)
        # Before a checkpoint's weights take the place of those that the run began with.
        pretrained = _pretrained_backbone(plan, environment)
        engine, optimizer, average, state = _start_engine(plan, environment)
        start_step = int(state["step"])
        if environment.rank == 0:
            create_run(config, plan.classes, environment.world_size, start_step)
            forget_outcome(config.folder)
        dist.barrier()
        clock = stack.enter_context(PhaseClock(watchdog, environment.device))
        telemetry = stack.enter_context(
            Telemetry(
                config,
                plan.classes,
                clock,
                device=environment.device,
                start_step=start_step,
                flops=flops,
                windows=state["windows"],
            )
        )

        def batches(manifests: Sequence[Manifest], domain: DomainName, global_batch: int) -> Iterator[Batch]:
            return stack.enter_context(closing(_stream(plan, manifests, domain, global_batch, environment, start_step)))

        yield Session(
            environment,
            engine,
            optimizer,
            base_rates=[group["lr"] for group in optimizer.param_groups],
            average=average,
            pretrained=pretrained,
            start_step=start_step,
            sources=batches(plan.sources, "source", training.source_batch),
            targets=batches(plan.targets, "target", training.target_batch) if plan.targets else repeat(None),
            clock=clock,
            telemetry=telemetry,
            bad_steps=BadSteps(engine.module, config.folder, training.max_bad_steps),
            loss_scale=LossScale(engine, enabled=training.precision == "fp16", state=state),
            checkpoints=stack.enter_context(
                CheckpointWriter(config.folder / "checkpoints", config, device=environment.device)
            ),
        )


def _pretrained_backbone(plan: Plan, environment: DistributedEnvironment) -> FrozenBackbone | None:
    if plan.config.objective.feature_distance.weight == 0:
        return None
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.config.training.precision]
    return FrozenBackbone(plan.model, autocast=autocast).to(environment.device)


def _start_engine(
    plan: Plan, environment: DistributedEnvironment
) -> tuple[Any, torch.optim.Optimizer, Average | None, dict[str, Any]]:
    config = plan.config
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    if checkpoint is not None:
        load_model(plan.model, checkpoint)
    engine, optimizer = environment.accelerator.prepare(plan.model, build_optimizer(config.optimizer, plan.model))
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
    plan: Plan,
    manifests: Sequence[Manifest],
    domain: DomainName,
    global_batch: int,
    environment: DistributedEnvironment,
    start_step: int,
) -> Generator[Batch, None, None]:
    batches = stream(
        plan.config.data,
        manifests,
        domain,
        seed=plan.config.seed,
        rank=environment.rank,
        world_size=environment.world_size,
        global_batch=global_batch,
        accumulation=plan.config.training.accumulation,
        start_step=start_step,
        targets=plan.targets,
    )
    return to_device(batches, environment.device)
