"""The training loop beside a bare one: the same network, losses, optimiser, DeepSpeed and data, in turn in one run."""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from dist_pca.data.randomness import Domain
from dist_pca.data.stream import stream
from dist_pca.data.to_device import to_device
from dist_pca.evaluation.validation import validate
from dist_pca.model.segmenter import build_segmenter
from dist_pca.objective import Domain as Outputs
from dist_pca.objective import objective
from dist_pca.resilience.preemption import StopRequest
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.bench.demonstration import train_demonstration
from dist_pca.tools.bench.report import Record
from dist_pca.train import resolve_config
from dist_pca.training.deepspeed_config import deepspeed_config
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.prepare import PreparedRun, prepare_run
from dist_pca.training.trainer import Trainer

MODULE = "dist_pca.tools.bench.train"
SETTINGS = {
    **dict.fromkeys(("objective.self_training.weight", "data.photometric.probability", "training.ema_decay"), 0),
    **{f"objective.association.teacher_{what}": False for what in ("check", "weight", "matches")},
    "model.joint_batch": True,
    "model.running_statistics": "all",
}
"""What a bare loop computes: the paper's terms, without a teacher, on both domains in one pass."""
WARM_UP = 3
"""Steps of each loop that do not count."""


def measure_train(folder: Path, repeats: int) -> list[Record]:
    """Seconds per step of both loops, and their ratio, on two processes or on all GPUs.

    Args:
        folder: An empty folder.
        repeats: Timed steps of each loop, one after the other; the median of their ratios counts.

    Raises:
        UserError: the run fails.
    """
    last = repeats + WARM_UP
    # Every step logged is the most that telemetry can cost.
    run = train_demonstration(folder, MODULE, SETTINGS, steps=last, log_every=1, checkpoint_every=last)
    pairs = json.loads((run / "steps.json").read_text())[WARM_UP:]
    ours, bare = zip(*pairs, strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    return [
        {"name": "loop_ratio", "value": ratio, "unit": "of the bare loop's step"},
        {"name": "step_seconds", "value": statistics.median(ours), "unit": "s"},
        {"name": "bare_step_seconds", "value": statistics.median(bare), "unit": "s"},
    ]


class _InTurn(StopRequest):
    """Asked after every step of the training loop whether it shall stop, it first lets a bare loop make one."""

    def __init__(self, plan: PreparedRun) -> None:
        super().__init__()
        self.pairs: list[tuple[float, float]] = []
        self._plan = plan
        self._bare: Iterator[None] | None = None
        self._since = time.perf_counter()

    def any_rank(self, step: int, device: torch.device) -> bool:
        stopping = super().any_rank(step, device)
        self._bare = self._bare or bare_steps(self._plan, device)
        ours = _now(device)
        next(self._bare)
        bare = _now(device)
        self.pairs.append((ours - self._since, bare - ours))
        self._since = bare
        return stopping


def bare_steps(plan: PreparedRun, device: torch.device) -> Iterator[None]:
    """Steps as a script would make them that has nothing but DeepSpeed, the network and the losses."""
    import deepspeed

    config, training = plan.config, plan.config.training
    network: torch.nn.Module = build_segmenter(config.model, len(plan.classes))
    optimizer = build_optimizer(config.optimizer, network)  # type: ignore[arg-type]
    settings = deepspeed_config(config)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    domains: Sequence[tuple[Sequence[Manifest], Domain, int]] = (
        (plan.sources, "source", training.source_batch),
        (plan.targets, "target", training.target_batch),
    )
    with ExitStack() as stack:
        sources, targets = (
            stack.enter_context(
                closing(
                    to_device(
                        stream(
                            config.data,
                            manifests,
                            domain,
                            seed=config.seed,
                            rank=dist.get_rank(),
                            world_size=dist.get_world_size(),
                            global_batch=batch,
                            accumulation=1,
                            start_step=0,
                            targets=plan.targets,
                        ),
                        device,
                    )
                )
            )
            for manifests, domain, batch in domains
        )
        for step in count():
            source, target = next(sources), next(targets)
            size = len(source.images)
            logits, features, _ = engine(torch.cat([source.images, target.images]))
            loss, _ = objective(
                config.objective,
                Outputs(logits[:size], features[:size], source.labels),
                Outputs(logits[size:], features[size:], target.labels),
                step=step,
            )
            engine.backward(loss)
            engine.step()
            yield


def _now(device: torch.device) -> float:
    """The time at which all ranks have come this far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter()


def main(config: str, *overrides: str) -> None:
    """One rank of the run."""
    plan = prepare_run(resolve_config(config, list(overrides)), world_size=int(os.environ["WORLD_SIZE"]), resume=None)
    stop = _InTurn(plan)
    with Trainer(plan, stop, validate) as trainer:
        trainer.train()
    if dist.get_rank() == 0:
        (plan.config.folder / "steps.json").write_text(json.dumps(stop.pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
