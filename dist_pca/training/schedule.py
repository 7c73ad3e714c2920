"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from dist_pca.config import RunConfig


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """Factor on every group's base learning rate at a step (from 0): linear warm-up times poly decay."""
    schedule = config.schedule
    factor = 1.0
    if schedule.warmup_steps > 0:
        factor = min(1.0, (step + 1) / schedule.warmup_steps)
    if schedule.name == "poly":
        horizon = schedule.horizon or config.training.steps
        factor *= (1 - step / horizon) ** schedule.power
    return factor
