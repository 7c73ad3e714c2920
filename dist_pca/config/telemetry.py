"""`telemetry.*`: metrics loggers, sample keys and profiling."""

import re
from typing import Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from dist_pca.config.section import NonNegative, Positive, Section
from dist_pca.errors import UserError

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab"]


class TelemetryConfig(Section):
    """What a run logs in addition to `metrics.jsonl`, which is always written."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Trackers that also log the metrics, through Accelerate: TensorBoard (in the run folder), Weights & Biases and
    others."""
    project: str = "dist-pca"
    """Name of the trackers' project or experiment."""
    tracker_options: dict[Tracker, dict[str, Any]] = {}
    """Arguments for initialising a tracker, by its name, for example `{wandb: {entity: us, mode: offline}}`."""
    report: bool = True
    """Write `report.html` into the run folder when training ends: result, curves, time and settings, as `dist-pca
    report` does, but without what needs another pass of the network."""
    pictures_every: NonNegative = 0
    """Steps between pictures of the current images for the trackers that show images: input, truth, prediction, pseudo
    labels with their weight, mixed and masked images, and cycles. They change nothing that is computed. 0 is off."""
    sample_keys: bool = False
    """Write samples.jsonl: for every step the sample keys of all ranks, in global order."""
    profile_start: Positive | None = None
    """First step, counted from 1, of a torch.profiler trace; None records no trace."""
    profile_steps: Positive = 5
    """Number of steps in the trace."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if unused := sorted(set(self.tracker_options) - set(self.trackers)):
            raise ValueError(f"tracker_options: {unused[0]} is not one of telemetry.trackers; add it there")
        return self


def profile_overrides(wanted: str) -> list[str]:
    """Turn START:STEPS into config overrides.

    Raises:
        UserError: `wanted` has another form.
    """
    parts = re.fullmatch(r"(\d+):(\d+)", wanted)
    if parts is None:
        raise UserError(f"--profile {wanted}: write START:STEPS, for example 100:5 for five steps from step 100 on")
    return [f"telemetry.profile_start={parts[1]}", f"telemetry.profile_steps={parts[2]}"]
