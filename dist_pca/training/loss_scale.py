"""Dynamic loss scaling for fp16, whose smallest gradients would else be rounded to zero.

DeepSpeed divides gradients and their norm by the scale that it is given. Its own scaler for autocast does not: a step
that overflows is skipped before the scaler hears of it, so the scale never falls, and clipping compares with scaled
norms.
"""

import math
from typing import Any

FIRST, LARGEST = 2.0**16, 2.0**24
GROWTH_STEPS = 2000
"""Finite steps in a row after which the scale is doubled."""


class LossScale:
    """A power of two that halves when a gradient overflows and doubles when none has for long."""

    def __init__(self, engine: Any, *, enabled: bool, state: dict[str, Any]) -> None:
        """Scale the engine's losses from now on, if enabled.

        Args:
            engine: DeepSpeed's.
            enabled: Under fp16.
            state: What `state` gave when the run was saved; empty at its start.
        """
        self._engine, self._enabled = engine, enabled
        self.value = float(state.get("loss_scale", FIRST)) if enabled else 1.0
        self._finite_steps = int(state.get("loss_scale_steps", 0))
        if enabled:
            engine.optimizer.torch_autocast_gradscaler = None
            engine.optimizer.override_loss_scale(self.value)

    @property
    def state(self) -> dict[str, float]:
        """What has to be saved."""
        return {"loss_scale": self.value, "loss_scale_steps": self._finite_steps} if self._enabled else {}

    def update(self, gradient_norm: float) -> bool:
        """Take note of a step's gradient norm, the same on all ranks; whether the scale was to blame for a bad one."""
        if not self._enabled:
            return False
        before = self.value
        if math.isfinite(gradient_norm):
            self._finite_steps += 1
            if self._finite_steps % GROWTH_STEPS == 0:
                self.value = min(2 * self.value, LARGEST)
        else:
            self._finite_steps, self.value = 0, max(1.0, self.value / 2)
        self._engine.optimizer.override_loss_scale(self.value)
        return self.value < before
