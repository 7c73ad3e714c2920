"""`telemetry.*`: what a run tells, and to whom."""

import re
from typing import Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from dist_pca.config.section import Positive, Section
from dist_pca.errors import UserError

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab"]


class TelemetryConfig(Section):
    """What a run tells, and to whom. `metrics.jsonl` is always written."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Who else is told, through Accelerate: TensorBoard in the run folder, Weights & Biases and others."""
    project: str = "dist-pca"
    """The trackers' project or experiment."""
    tracker_options: dict[Tracker, dict[str, Any]] = {}
    """Arguments for a tracker's start, by its name, for example `{wandb: {entity: us, mode: offline}}`."""
    sample_keys: bool = False
    """Write samples.jsonl: the keys of the samples of every step, of all ranks, in their global order."""
    profile_start: Positive | None = None
    """Step, counted from 1, with which a trace of torch.profiler begins; None makes none."""
    profile_steps: Positive = 5
    """Steps in the trace."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if unused := sorted(set(self.tracker_options) - set(self.trackers)):
            raise ValueError(f"tracker_options: {unused[0]} is not one of telemetry.trackers; add it there")
        return self


def profile_overrides(wanted: str) -> list[str]:
    """The overrides that START:STEPS stands for.

    Raises:
        UserError: it is something else.
    """
    parts = re.fullmatch(r"(\d+):(\d+)", wanted)
    if parts is None:
        raise UserError(f"--profile {wanted}: write START:STEPS, for example 100:5 for five steps from step 100 on")
    return [f"telemetry.profile_start={parts[1]}", f"telemetry.profile_steps={parts[2]}"]
