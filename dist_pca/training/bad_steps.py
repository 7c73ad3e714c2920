"""Steps whose loss or gradient is not finite: skipped on all ranks together, counted, and ended when they go on."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.data.batch import Batch
from dist_pca.errors import UserError
from dist_pca.objective import Domain, Domains
from dist_pca.training.outcome import ExitCode

_log = logging.getLogger("dist_pca.training")
TERMS = (
    *("ce", "lovasz", "smoothness_source", "smoothness_target", "association_features", "association_predictions"),
    *("self_training", "masked_consistency", "source_contrast", "feature_distance"),
)
"""What a loss is the sum of; other values that are told may be undefined."""


class Diverged(UserError):
    """Too many bad steps in a row."""

    EXIT_CODE = ExitCode.DIVERGED


class Watched(NamedTuple):
    """One micro-batch, as far as a report needs it."""

    keys: dict[str, list[str]]
    finite: dict[str, torch.Tensor]
    """By name, whether all of it is; not the values, which would keep every micro-batch's outputs in memory."""


def finite(domain: Domain) -> Domain:
    """The domain with zeros for values that are not finite, which association refuses on all ranks."""
    return domain._replace(
        logits=_zeroed(domain.logits),
        features=_zeroed(domain.features),
        teacher_logits=None if domain.teacher_logits is None else _zeroed(domain.teacher_logits),
        teacher_features=None if domain.teacher_features is None else _zeroed(domain.teacher_features),
    )


class BadSteps:
    """Makes a bad step's update a skipped one, which leaves no trace in weights, optimiser and buffers.

    A rank whose loss is not finite multiplies it by NaN. Gradients are averaged over ranks, so the gradient norm, which
    DeepSpeed computes for all of them and skips the update by, tells every rank without a word more between them.
    """

    def __init__(self, module: torch.nn.Module, folder: Path, limit: int) -> None:
        """Watch a network's steps.

        Args:
            module: Its buffers are put back after a bad step.
            folder: The run folder, for bad_step.json.
            limit: Bad steps in a row that end the run.
        """
        self._folder, self._limit = folder, limit
        self._buffers = list(module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._watched: list[Watched] = []
        self.in_a_row = 0

    def begin(self) -> None:
        """A step begins."""
        _copy(self._buffers, self._before)
        self._watched = []

    def watch(
        self,
        loss: torch.Tensor,
        terms: dict[str, torch.Tensor],
        domains: Sequence[Domain | None],
        batches: Sequence[Batch | None],
    ) -> torch.Tensor:
        """The loss of a micro-batch, or NaN with a graph where it or what it was made of is not finite.

        Args:
            loss: Scalar.
            terms: What it is the sum of, by name.
            domains: Outputs of the network, in the order of `Domains`.
            batches: The source's and the target's, which they are outputs for.
        """
        values = {name: terms[name] for name in TERMS if name in terms}
        for name, domain in zip(Domains._fields, domains, strict=False):
            if domain is not None:
                values |= {f"{name} logits": domain.logits, f"{name} features": domain.features}
        keys = {
            name: batch.keys for name, batch in zip(("source", "target"), batches, strict=True) if batch is not None
        }
        # A sum is finite only if all of it is, and reads each value once.
        sums = [value.detach().sum(dtype=torch.float32) for value in (loss, *values.values())]
        sound = torch.stack(sums).isfinite()
        self._watched.append(Watched(keys, dict(zip(values, sound[1:].unbind(), strict=True))))
        return loss * torch.where(sound.all(), 1.0, torch.nan)

    def end(self, step: int, gradient_norm: float, *, excused: bool = False) -> bool:
        """Whether step number `step` (from 1) was skipped. Collective.

        Args:
            step: The step.
            gradient_norm: The same on all ranks.
            excused: A bad step does not count, as it was the loss scale's fault.

        Raises:
            Diverged: on every rank, at the limit; bad_step.json then names every rank's samples.
        """
        if math.isfinite(gradient_norm):
            self.in_a_row = 0
            return False
        _copy(self._before, self._buffers)
        if excused:
            return True
        self.in_a_row += 1
        ranks = self._all_reports()
        broken = "; ".join(f"rank {rank}: {', '.join(r['broken'])}" for rank, r in enumerate(ranks) if r["broken"])
        what = f"step {step}: not finite on {broken}" if broken else f"step {step}: the gradient norm is not finite"
        if dist.get_rank() == 0:
            _log.warning("%s; skipped, %d in a row of at most %d", what, self.in_a_row, self._limit)
        if self.in_a_row >= self._limit:
            report = self._folder / "bad_step.json"
            if dist.get_rank() == 0:
                content = {"step": step, "in_a_row": self.in_a_row, "ranks": ranks}
                report.write_text(json.dumps(content, indent=1) + "\n")
            dist.barrier()
            raise Diverged(
                f"{what}, the last of {self.in_a_row} in a row (training.max_bad_steps); {report} names the samples; "
                "lower optimizer.lr or set optimizer.clip_norm, and go on with --resume"
            )
        return True

    def _all_reports(self) -> list[dict[str, Any]]:
        own = {
            "keys": [watched.keys for watched in self._watched],
            "broken": sorted(
                {name for watched in self._watched for name, sound in watched.finite.items() if not sound}
            ),
        }
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, own)
        return reports


def _copy(tensors: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    # A network has hundreds of buffers, and each copy of its own would be a kernel to launch.
    if tensors:
        torch._foreach_copy_(into, tensors)


def _zeroed(values: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
