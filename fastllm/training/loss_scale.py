"""The factor on a loss whose gradients are computed in float16, where small ones would be 0 (Micikevicius et al. 2018).

The rule is ``torch.amp.GradScaler``'s, on the run's own State, so that a resumed run scales alike: the factor is halved
where a gradient overflows, whose step is not taken, and doubled after GROWTH_STEPS steps that did not.
"""

from __future__ import annotations

import math

from .checkpoints.checkpoint import State

FIRST, LEAST = 2.0**16, 1.0
# No larger: beyond it a loss of 1 would itself be near float32's largest number times a gradient of 1.
LARGEST = 2.0**64
GROWTH_STEPS = 2000


class LossScale:
    """What a loss is multiplied with; 1 in any dtype but float16, always a power of 2, which rounds nothing."""

    def __init__(self, state: State):
        self._state = state
        if state.dtype == "float16" and state.loss_scale is None:
            state.loss_scale = FIRST

    @property
    def value(self) -> float:
        return self._state.loss_scale or 1.0

    def overflow(self, loss: float, norm: float) -> str | None:
        """Settle the next step's factor by what this step came to. Why the step is not to be taken, or None.

        A loss that is not finite is not the factor's fault, nor is a gradient that is not where the factor is 1.
        """
        state = self._state
        if state.loss_scale is None or not math.isfinite(loss):
            return None
        if math.isfinite(norm):
            state.scaled_steps += 1
            if state.scaled_steps == GROWTH_STEPS:
                state.loss_scale, state.scaled_steps = min(2.0 * state.loss_scale, LARGEST), 0
            return None
        if state.loss_scale <= LEAST:
            return None
        before, state.scaled_steps = state.loss_scale, 0
        state.loss_scale = before / 2.0
        return f"a gradient overflowed float16 at a loss scale of {before:g}, now {state.loss_scale:g}"
