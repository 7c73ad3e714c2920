"""Steps whose loss or gradient is not finite: skipped on all ranks, counted, and fatal after too many in a row."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.data.collate import Batch
from dist_pca.distributed import gather_objects
from dist_pca.errors import UserError
from dist_pca.files import write_json
from dist_pca.objective import Domain, Domains
from dist_pca.objective.class_statistics import ClassStatistics
from dist_pca.resilience.exit_status import ExitCode
from dist_pca.training.deepspeed import disable_grad_scaler, set_loss_scale

_log = logging.getLogger("dist_pca.training")
FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
GROWTH_STEPS = 2000
"""Finite steps in a row after which the scale is doubled."""
TERMS = (
    *("ce", "dice", "lovasz", "smoothness_source", "smoothness_target"),
    *("association_features", "association_predictions"),
    *("self_training", "masked_consistency", "source_contrast", "class_statistics", "feature_distance"),
)
"""Names of the loss's summands; other logged values may be undefined."""


class Diverged(UserError):
    """Too many non-finite steps in a row."""

    EXIT_CODE = ExitCode.DIVERGED


class MicroBatchReport(NamedTuple):
    """One micro-batch in the report of a non-finite step."""

    keys: dict[str, list[str]]
    """Sample keys by domain."""
    finite: dict[str, torch.Tensor]
    """Whether a tensor is finite, by name; the tensors themselves would keep every micro-batch's outputs in memory."""


def zero_non_finite(domain: Domain) -> Domain:
    """Replace values of a domain that are not finite by zeros; association would raise on them on all ranks."""
    return domain._replace(
        logits=_zeroed(domain.logits),
        features=_zeroed(domain.features),
        teacher_logits=None if domain.teacher_logits is None else _zeroed(domain.teacher_logits),
        teacher_features=None if domain.teacher_features is None else _zeroed(domain.teacher_features),
    )


class NonFiniteSteps:
    """Skips non-finite steps, so that they change neither weights nor optimiser, buffers nor class statistics.

    A loss that is not finite on one rank is multiplied by NaN there. Gradients are averaged over ranks, so every rank
    finds it in the gradient norm (found_inf), by which DeepSpeed skips the update, without further communication.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        folder: Path,
        limit: int,
        *,
        statistics: ClassStatistics | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare to check steps.

        Args:
            module: The network; its buffers are restored after a non-finite step.
            folder: The run folder, for non_finite_step.json.
            limit: Number of non-finite steps in a row that ends the run.
            statistics: Class statistics, restored likewise.
            state: The `state` that was saved with the run; None at its start.
        """
        self._folder, self._limit = folder, limit
        self._buffers = list(module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._statistics = statistics
        self._reports: list[MicroBatchReport] = []
        self.consecutive = int((state or {}).get("non_finite_steps", 0))

    @property
    def state(self) -> dict[str, int]:
        """Values to save with a checkpoint."""
        return {"non_finite_steps": self.consecutive} if self.consecutive else {}

    def begin_step(self) -> None:
        """Back up buffers and class statistics before a step."""
        _copy(self._buffers, self._before)
        # An update replaces its tensors and leaves these as they are.
        self._statistics_before = None if self._statistics is None else replace(self._statistics)
        self._reports = []

    def check_loss(
        self,
        loss: torch.Tensor,
        terms: dict[str, torch.Tensor],
        domains: Sequence[Domain | None],
        batches: Sequence[Batch | None],
    ) -> torch.Tensor:
        """Return a micro-batch's loss, or NaN with a graph if it, a term or a network output is not finite.

        Args:
            loss: Scalar.
            terms: Its summands and diagnostics, by name.
            domains: Outputs of the network, in the order of `Domains`.
            batches: Source and target batch that they are outputs for.
        """
        values = {name: terms[name] for name in TERMS if name in terms}
        for name, domain in zip(Domains._fields, domains, strict=False):
            if domain is not None:
                values |= {f"{name} logits": domain.logits, f"{name} features": domain.features}
        keys = {
            name: batch.keys for name, batch in zip(("source", "target"), batches, strict=True) if batch is not None
        }
        # A sum is finite only if every element is, and reads each element once.
        sums = [value.detach().sum(dtype=torch.float32) for value in (loss, *values.values())]
        finite = torch.stack(sums).isfinite()
        self._reports.append(MicroBatchReport(keys, dict(zip(values, finite[1:].unbind(), strict=True))))
        return loss * torch.where(finite.all(), 1.0, torch.nan)

    def end_step(self, step: int, gradient_norm: float, *, scale_overflowed: bool = False) -> bool:
        """Whether the update of step `step` (from 1) was skipped. Collective.

        Args:
            step: The step.
            gradient_norm: The same on all ranks.
            scale_overflowed: The loss scale was too large, so that a non-finite step does not count.

        Raises:
            Diverged: on every rank, at the limit; non_finite_step.json then names the samples of every rank.
        """
        if math.isfinite(gradient_norm):
            self.consecutive = 0
            return False
        _copy(self._before, self._buffers)
        if self._statistics is not None:
            vars(self._statistics).update(vars(self._statistics_before))
        if scale_overflowed:
            return True
        self.consecutive += 1
        ranks = self._gather_reports()
        broken = "; ".join(
            f"rank {rank}: {', '.join(r['non_finite'])}" for rank, r in enumerate(ranks) if r["non_finite"]
        )
        what = f"step {step}: not finite on {broken}" if broken else f"step {step}: the gradient norm is not finite"
        if dist.get_rank() == 0:
            _log.warning("%s; skipped, %d in a row of at most %d", what, self.consecutive, self._limit)
        if self.consecutive >= self._limit:
            report = self._folder / "non_finite_step.json"
            if dist.get_rank() == 0:
                write_json(report, {"step": step, "consecutive": self.consecutive, "ranks": ranks})
            dist.barrier()
            raise Diverged(
                f"{what}, the last of {self.consecutive} in a row (training.max_non_finite_steps); {report} names the "
                "samples; lower optimizer.lr or set optimizer.clip_norm, and resume with --resume"
            )
        return True

    def _gather_reports(self) -> list[dict[str, Any]]:
        own = {
            "keys": [report.keys for report in self._reports],
            "non_finite": sorted(
                {name for report in self._reports for name, finite in report.finite.items() if not finite}
            ),
        }
        return gather_objects(own)


def _copy(tensors: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    # A network has hundreds of buffers; one copy for each would be as many kernel launches.
    if tensors:
        torch._foreach_copy_(into, tensors)


def _zeroed(values: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


class LossScale:
    """A power of two that halves when a gradient overflows and doubles after many steps in which none has."""

    def __init__(self, engine: Any, *, enabled: bool, state: Mapping[str, Any]) -> None:
        """Scale the engine's losses from now on, if enabled.

        Args:
            engine: DeepSpeed's.
            enabled: Under fp16.
            state: The `state` that was saved with the run; empty at its start.
        """
        self._engine, self._enabled = engine, enabled
        self.value = float(state.get("loss_scale", FIRST_SCALE)) if enabled else 1.0
        self._finite_steps = int(state.get("loss_scale_steps", 0))
        if enabled:
            disable_grad_scaler(engine)
            set_loss_scale(engine, self.value)

    @property
    def state(self) -> dict[str, float]:
        """Values to save with a checkpoint."""
        return {"loss_scale": self.value, "loss_scale_steps": self._finite_steps} if self._enabled else {}

    def update(self, gradient_norm: float) -> bool:
        """Adapt the scale to a step's gradient norm, which is the same on all ranks.

        Returns:
            Whether the norm was not finite because the scale was too large (found_inf), so that the step does not count
            as non-finite.
        """
        if not self._enabled:
            return False
        before = self.value
        if math.isfinite(gradient_norm):
            self._finite_steps += 1
            if self._finite_steps % GROWTH_STEPS == 0:
                self.value = min(2 * self.value, LARGEST_SCALE)
        else:
            self._finite_steps, self.value = 0, max(1.0, self.value / 2)
        set_loss_scale(self._engine, self.value)
        return self.value < before
