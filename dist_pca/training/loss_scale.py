"""Dynamic loss scaling for fp16, whose smallest gradients would otherwise be rounded to zero.

DeepSpeed divides gradients and their norm by the scale that it is given. Its own scaler for autocast does not: a step
that overflows is skipped before the scaler is updated, so the scale never falls, and clipping compares with scaled
norms.
"""

import math
from typing import Any

from dist_pca.training.deepspeed_internals import disable_grad_scaler, set_loss_scale

FIRST, LARGEST = 2.0**16, 2.0**24
GROWTH_STEPS = 2000
"""Finite steps in a row after which the scale is doubled."""


class LossScale:
    """A power of two that halves when a gradient overflows and doubles after many steps in which none has."""

    def __init__(self, engine: Any, *, enabled: bool, state: dict[str, Any]) -> None:
        """Scale the engine's losses from now on, if enabled.

        Args:
            engine: DeepSpeed's.
            enabled: Under fp16.
            state: The `state` that was saved with the run; empty at its start.
        """
        self._engine, self._enabled = engine, enabled
        self.value = float(state.get("loss_scale", FIRST)) if enabled else 1.0
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
                self.value = min(2 * self.value, LARGEST)
        else:
            self._finite_steps, self.value = 0, max(1.0, self.value / 2)
        set_loss_scale(self._engine, self.value)
        return self.value < before
