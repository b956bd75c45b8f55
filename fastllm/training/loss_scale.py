"""The factor on a loss whose gradients are computed in float16, where small ones would be 0 (Micikevicius et al. 2018).

The rule is ``torch.amp.GradScaler``'s, on the run's own State, so that a resumed run scales alike. Where a gradient
overflows, the step is not taken and the factor is halved. After GROWTH_STEPS steps without an overflow it is doubled.
"""

from __future__ import annotations

import math

from .checkpoints.checkpoint import State

# GradScaler's own, as is GROWTH_STEPS.
INITIAL, MIN_SCALE = 2.0**16, 1.0
# With a larger factor a loss of 1 and its gradients would come near float32's largest number.
MAX_SCALE = 2.0**64
GROWTH_STEPS = 2000


class LossScale:
    """The factor on a loss: 1 in any dtype but float16, and always a power of 2, so that scaling rounds nothing."""

    def __init__(self, state: State):
        self._state = state
        if state.dtype == "float16" and state.loss_scale is None:
            state.loss_scale = INITIAL

    @property
    def value(self) -> float:
        return self._state.loss_scale or 1.0

    def overflow(self, loss: float, norm: float) -> str | None:
        """Set the next step's factor by this step's loss and norm; says why the step is not to be taken, or None.

        The factor is not to blame for a loss that is not finite, nor for such a gradient where the factor is 1.
        """
        state = self._state
        if state.loss_scale is None or not math.isfinite(loss):
            return None
        if math.isfinite(norm):
            state.scaled_steps += 1
            if state.scaled_steps == GROWTH_STEPS:
                state.loss_scale, state.scaled_steps = min(2.0 * state.loss_scale, MAX_SCALE), 0
            return None
        if state.loss_scale <= MIN_SCALE:
            return None
        before, state.scaled_steps = state.loss_scale, 0
        state.loss_scale = before / 2.0
        return f"a gradient overflowed float16 at a loss scale of {before:g}, now {state.loss_scale:g}"
