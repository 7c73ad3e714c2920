"""The trainer: processes, engine, data and logs of a run, and the loop over its steps."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from typing_extensions import Self

from dist_pca.data.collate import Batch
from dist_pca.data.randomness import Domain as DomainName
from dist_pca.data.stream import stream
from dist_pca.data.to_device import to_device
from dist_pca.distributed import raise_on_all_ranks
from dist_pca.errors import UserError
from dist_pca.model.batch_norm import kept_statistics
from dist_pca.model.frozen import AUTOCAST, FrozenBackbone
from dist_pca.objective import Domains, objective
from dist_pca.objective.class_statistics import ClassStatistics
from dist_pca.resilience.exit_status import ExitCode, clear_exit_status
from dist_pca.resilience.lock import run_lock
from dist_pca.resilience.preemption import StopRequest
from dist_pca.resilience.watchdog import Watchdog
from dist_pca.shards.manifest import Manifest
from dist_pca.training.accumulation import Loss, MicroBatch, grad_cache, separate_losses
from dist_pca.training.checkpoint import CheckpointWriter, State, read_state
from dist_pca.training.checkpoint_loading import check_files, common_checkpoint, load_model
from dist_pca.training.checkpoint_parts import AveragePart, ModelPart, checkpoint_parts, restore
from dist_pca.training.ema import init_ema, teacher_weights, update_ema
from dist_pca.training.environment import connect_store, init_distributed
from dist_pca.training.metrics import MetricsLogger
from dist_pca.training.non_finite import LossScale, NonFiniteSteps, zero_non_finite
from dist_pca.training.optimizer import build_optimizer, learning_rate_factor
from dist_pca.training.pictures import PictureLog
from dist_pca.training.prepare import PreparedRun
from dist_pca.training.profiling import PhaseClock, network_flops
from dist_pca.training.run_folder import RunData, create_run
from dist_pca.training.views import Views, forward_views, student_views


class StudentBatch(NamedTuple):
    """A micro-batch as it was read, and the views of it that the student is trained on."""

    batches: tuple[Batch, Batch | None]
    """Source and target."""
    views: Views


class Trainer:
    """Trains a run on this rank; entering its context sets everything up, leaving it closes logs and writes files.

    Setting up, training and leaving are collective.
    """

    def __init__(
        self,
        run: PreparedRun,
        stop: StopRequest,
        validate: Callable[..., tuple[float, Sequence[float]]],
        draw: Callable[..., Mapping[str, Any]] | None = None,
    ) -> None:
        """Store what to train; nothing starts yet.

        Args:
            run: What to train.
            stop: Request to end early.
            validate: Returns the mean IoU and the IoU of each class, as `dist_pca.evaluation.validation.validate`.
            draw: Draws pictures, as `dist_pca.evaluation.training_pictures.training_pictures`; None draws none.
        """
        self.run, self.stop, self.validate, self.draw = run, stop, validate, draw
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        """Join the other ranks, and start the run or resume it from its newest checkpoint.

        Raises:
            UserError: another job trains in the folder, a checkpoint cannot be read, or ranks find different ones.
        """
        self.stop.limit(self.run.config.training.time_limit, os.environ)
        with ExitStack() as stack:
            self._set_up(stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    def train(self) -> ExitCode:
        """Train to the last step, or until a signal or the time limit asks to stop. Collective.

        Raises:
            UserError: a shard or a checkpoint cannot be read or written, or too many steps in a row are not finite.
        """
        config, training, engine, clock = self.run.config, self.run.config.training, self.engine, self.clock
        for step in range(self.start_step, training.steps):
            factor = learning_rate_factor(config, step)
            for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = base * factor
            # Dropout is seeded by (seed, step, rank), so that no generator state has to be stored.
            torch.manual_seed(hash((config.seed, step, self.environment.rank)) % 2**63)
            self.non_finite_steps.begin_step()
            for micro in self._micro_batches(step):
                clock.enter("backward")
                engine.backward(
                    self.non_finite_steps.check_loss(micro.loss, micro.terms, micro.domains, micro.batch.batches)
                )
                clock.enter("optimizer")
                engine.step()
                self.metrics.accumulate(micro.terms, micro.batch.batches)
                if self.pictures is not None:
                    clock.enter("log")
                    self.pictures.log(step + 1, *micro.batch, micro.domains, micro.terms)
                # Frees its activations before the next one's are allocated.
                del micro
            norm = float(engine.get_global_grad_norm() or 0.0)
            skipped = self.non_finite_steps.end_step(step + 1, norm, scale_overflowed=self.loss_scale.update(norm))
            if self.ema is not None and not skipped:
                update_ema(self.ema, engine, training.ema_decay, step + 1)
            last = step + 1 == training.steps
            mean_iou = self._validate(step + 1, last=last)
            clock.enter("log")
            scalars = {"learning_rate": config.optimizer.lr * factor, "gradient_norm": None if skipped else norm}
            self.metrics.log(step + 1, scalars | {"loss_scale": self.loss_scale.value}, skipped=skipped)
            stopping = self.stop.any_rank(step + 1, self.device)
            self.checkpoints.poll()
            if (step + 1) % training.checkpoint_every == 0 or last or stopping or mean_iou is not None:
                self._save(step + 1, mean_iou)
            if stopping and not last:
                return self.stop.exit_code
        return ExitCode.DONE

    def _micro_batches(self, step: int) -> Iterator[MicroBatch[StudentBatch]]:
        """Yield the micro-batches of a step (from 0), passed through the network and ready for backward."""
        config, training, engine, clock = self.run.config, self.run.config.training, self.engine, self.clock
        cached = training.grad_cache and training.accumulation > 1
        adaptive = config.model.running_statistics == "target"
        keep_statistics = partial(kept_statistics, engine.module) if adaptive else nullcontext

        def next_batch() -> StudentBatch:
            clock.enter("data", step + 1)
            source, target = next(self.sources), next(self.targets)
            clock.enter("teacher")
            views = student_views(
                config, source, target, engine, self._as_teacher, self.pretrained, mean=engine.module.mean, step=step
            )
            return StudentBatch((source, target), views)

        def forward(batch: StudentBatch) -> Domains:
            clock.enter("forward")
            return forward_views(engine, batch.views, joint=config.model.joint_batch, keep_statistics=keep_statistics)

        def loss_of(domains: Domains) -> Loss:
            return objective(
                config.objective,
                *(None if domain is None else zero_non_finite(domain) for domain in domains),  # type: ignore[arg-type]
                step=step,
                accumulation=1 if cached else training.accumulation,
                node=self.environment.node_group,
                things=self.run.things,
                statistics=self.class_statistics,
                class_weights=self.run.class_weights,
                # A run without association shows what its matches would be, for comparison.
                judge=(step + 1) % training.log_every == 0 or step + 1 == training.steps,
            )

        if cached:
            return grad_cache(next_batch, forward, loss_of, training.accumulation, engine.module)
        return separate_losses(next_batch, forward, loss_of, training.accumulation)

    def _as_teacher(self) -> AbstractContextManager[None]:
        """Give the engine's network the teacher's weights while the context is open. Collective."""
        assert self.ema is not None
        return teacher_weights(self.engine, self.ema)

    def _validate(self, step: int, *, last: bool) -> float | None:
        """Mean IoU on the validation shards after step `step` (from 1), None if none is due. Collective."""
        run, training = self.run, self.run.config.training
        due = last or step % (training.validate_every or training.checkpoint_every) == 0
        if run.validation is None or not due:
            return None
        self.clock.enter("validation")
        network = ModelPart(self.engine, None) if self.ema is None else AveragePart(self.engine, self.ema)
        mean_iou, iou = self.validate(
            network.tensors(),
            run.validation,
            run.classes,
            run.config,
            device=self.device,
            progress=partial(self.clock.enter, "validation"),
        )
        scores = {"validation_mean_iou": torch.tensor(mean_iou), "validation_iou": torch.tensor(iou)}
        self.metrics.accumulate({name: score.to(self.device) for name, score in scores.items()}, ())
        return mean_iou

    def _save(self, step: int, mean_iou: float | None) -> None:
        """Start writing a checkpoint after step `step` (from 1). Collective."""
        self.clock.enter("checkpoint")
        samples = {key: step * batch + self.offsets[key] for key, batch in self.run.config.batches.items()}
        state = {"mean_iou": mean_iou, "windows": self.metrics.state(), "samples": samples}
        self.checkpoints.save(self.parts, step, state={**state, **self.loss_scale.state, **self.non_finite_steps.state})

    def _set_up(self, stack: ExitStack) -> None:
        run, config, training = self.run, self.run.config, self.run.config.training
        self.environment = init_distributed(config)
        self.stop.joined()
        rank, world_size = self.environment.rank, self.environment.world_size
        self.device = self.environment.device
        watchdog = stack.enter_context(
            Watchdog(connect_store(), rank, world_size, timeout=training.stall_timeout, folder=config.folder)
        )
        # Ranks of a launch that was cut short may still be exiting, on a node that learns of it late.
        restarted = any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) for name in ("SLURM", "TORCHELASTIC"))
        wait = training.stall_timeout / 2 if restarted else 0.0
        stack.enter_context(run_lock(config.folder, wait=wait, waiting=partial(watchdog.enter, "start")))
        flops = network_flops(run.model, run.model.backbone.options.bands, *config.data.crop)
        # Before a checkpoint's weights replace those that the run began with.
        self.pretrained = self._pretrained_backbone()
        try:
            checkpoint = common_checkpoint(config.folder / "checkpoints")
        except UserError:
            # Every rank reports it, in a folder that others may not see; an open watchdog would let one alone do so.
            stack.close()
            raise
        state = self._start_engine(checkpoint)
        self.start_step = int(state["step"])
        # Batches that are given per rank are others on another number of ranks.
        used = state.get("samples", {})
        self.offsets = {
            key: used[key] - self.start_step * batch if key in used else 0 for key, batch in config.batches.items()
        }
        failure = None
        if rank == 0:
            try:
                create_run(config, RunData(run.classes, run.sources, run.targets), world_size, self.start_step)
                clear_exit_status(config.folder)
            except OSError as error:
                failure = f"{config.folder}: cannot be written ({error}); fix that and start the run again"
        raise_on_all_ranks(failure)
        self.clock = stack.enter_context(PhaseClock(watchdog, self.device))
        self.metrics = stack.enter_context(
            MetricsLogger(
                config,
                run.classes,
                self.clock,
                device=self.device,
                start_step=self.start_step,
                flops=flops,
                saved=state.get("windows", []),
            )
        )
        self.pictures = None
        if self.draw is not None and config.telemetry.pictures_every:
            self.pictures = PictureLog(config, run.classes, self.metrics, self.draw)
        # Before the schedule's factor.
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.sources = self._stream(stack, run.sources, "source", training.source_batch)
        self.targets: Iterator[Batch | None] = (
            self._stream(stack, run.targets, "target", training.target_batch) if run.targets else repeat(None)
        )
        self.non_finite_steps = NonFiniteSteps(
            self.engine.module,
            config.folder,
            training.max_non_finite_steps,
            statistics=self.class_statistics,
            state=state,
        )
        self.loss_scale = LossScale(self.engine, enabled=training.precision == "fp16", state=state)
        self.checkpoints = stack.enter_context(
            CheckpointWriter(config.folder / "checkpoints", config, device=self.device)
        )

    def _pretrained_backbone(self) -> FrozenBackbone | None:
        """The backbone before the first step, where the feature distance compares with it."""
        if self.run.config.objective.feature_distance.weight == 0:
            return None
        autocast = AUTOCAST[self.run.config.training.precision]
        return FrozenBackbone(self.run.model, autocast=autocast).to(self.device)

    def _start_engine(self, checkpoint: Path | None) -> State:
        """Build engine, optimiser and moving average, restored from a checkpoint; returns its `state.json`."""
        config, model = self.run.config, self.run.model
        if checkpoint is not None:
            check_files(checkpoint)
            # Before DeepSpeed partitions the weights.
            load_model(model, checkpoint)
        self.engine: Any
        self.optimizer: torch.optim.Optimizer
        self.engine, self.optimizer = self.environment.accelerator.prepare(
            model, build_optimizer(config.optimizer, model)
        )
        self.ema = init_ema(self.engine) if config.training.ema_decay > 0 else None
        self.class_statistics = ClassStatistics() if config.objective.uses_statistics else None
        self.parts = checkpoint_parts(self.engine, self.ema, self.class_statistics)
        if checkpoint is not None:
            restore(self.parts, checkpoint)
        self.engine.train()
        return {"step": 0} if checkpoint is None else read_state(checkpoint)

    def _stream(
        self, stack: ExitStack, manifests: Sequence[Manifest], domain: DomainName, global_batch: int
    ) -> Iterator[Batch]:
        """Open a domain's micro-batches of this rank, on its device, from the first step that is to be trained."""
        batches = stream(
            self.run.config.data,
            manifests,
            domain,
            seed=self.run.config.seed,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            global_batch=global_batch,
            accumulation=self.run.config.training.accumulation,
            start_step=self.start_step,
            offset=self.offsets[f"training.{domain}_batch"],
            targets=self.run.targets,
        )
        return stack.enter_context(closing(to_device(batches, self.device)))
