"""Resuming: a run may continue in a folder that holds the same run, by the keys that decide what is computed."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.training.checkpoint import code_version, latest_checkpoint, read_state, read_step

_log = logging.getLogger("dist_pca.training")
FREE_KEYS = (
    *("name", "output", "data.workers", "data.validation", "evaluation", "telemetry"),
    *("model.activation_checkpointing", "model.compile", "training.offload", "training.validate_every"),
    *(f"training.{key}" for key in ("zero_stage", "log_every", "checkpoint_every", "keep_checkpoints")),
    *(f"training.{key}" for key in ("time_limit", "stall_timeout", "max_non_finite_steps")),
)
"""Keys and sections that do not change what is computed, and may differ when a run is resumed."""
GRAD_CACHE_KEYS = ("training.accumulation", "training.max_micro_batch")
"""Further keys of this kind under GradCache, where all micro-batches of an update have one loss."""


def check_resume(config: RunConfig, resume: bool | None) -> None:
    """Check that a run may start in its folder.

    Args:
        config: The run.
        resume: None resumes the same run; True also one whose keys differ, and logs them; False accepts only a folder
            without a run.

    Raises:
        UserError: the folder holds a run of another config (every differing key is named), or any run if `resume` is
            False.
    """
    made = config.folder / "config.yaml"
    if not made.is_file():
        return
    if resume is False:
        raise UserError(f"{config.folder}: already holds a run; drop --no-resume to resume it, or choose another name=")
    differing = config_differences(load_config(made), config)
    if differing and not resume:
        raise UserError(
            f"{config.folder}: holds a run of another config ({'; '.join(differing)}); choose another name=, "
            "or add --resume to resume it with the changed keys"
        )
    for difference in differing:
        _log.info("resuming with %s", difference)
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    if checkpoint is not None and (before := read_state(checkpoint).get("code")) != code_version():
        _log.info("resuming with dist-pca %s; %s was saved by %s", code_version(), checkpoint.name, before)


def config_differences(made: RunConfig, wanted: RunConfig) -> list[str]:
    """List the keys that decide what is computed and differ between two runs, each as `key: made -> wanted`."""
    free = (*FREE_KEYS, *(GRAD_CACHE_KEYS if wanted.training.grad_cache else ()))
    return list(_differences(made.model_dump(mode="json"), wanted.model_dump(mode="json"), free))


def is_finished(config: RunConfig) -> bool:
    """Whether the run has a checkpoint of its last step."""
    checkpoint = latest_checkpoint(config.folder / "checkpoints")
    return checkpoint is not None and read_step(checkpoint) >= config.training.steps


def _differences(old: dict[str, Any], new: dict[str, Any], free: Sequence[str], prefix: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*old, *new)):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if before == after or key in free:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, free, f"{key}.")
        else:
            yield f"{key}: {before} -> {after}"
