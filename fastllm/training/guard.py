"""Steps that must not be taken: a loss or gradient that is not finite, or far outside of what the last steps had."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..files import save_tensors, write_text
from .checkpoints.checkpoint import State

# An outlier is judged by this many accepted steps. With fewer than a quarter of them nothing is judged. Guesses.
HISTORY = 128
# Batches of skipped steps that are kept for study. A guess.
KEPT = 100


class Failed(RuntimeError):
    """A run cannot go on; the message is one line that says why."""


class Diverged(Failed):
    """Too many steps in a row had to be skipped."""


def deviation(value: float, history: list[float]) -> float:
    """By how many standard deviations ``value`` lies above the mean of ``history``; 0 where that is too short."""
    if len(history) < HISTORY // 4:
        return 0.0
    mean = math.fsum(history) / len(history)
    variance = math.fsum((x - mean) ** 2 for x in history) / len(history)
    # Equal values have no deviation to divide by; the parts of the mean that stand for it are guesses.
    return (value - mean) / max(math.sqrt(variance), 1e-6 * abs(mean), 1e-30)


class Guard:
    """Decides before each update whether it is made, and keeps the batches of those that were not.

    Its memory is the run's :class:`~fastllm.training.checkpoints.checkpoint.State`, so a resumed run decides alike.

    Args:
        folder: where to put ``step-<step>.safetensors`` (the batch) and ``.json`` (why); None: nowhere.
        outlier: the largest :func:`deviation` of loss and gradient norm that is accepted; None: any.
        limit: this many skipped steps in a row raise :class:`Diverged`.
    """

    def __init__(self, folder: Path | None, state: State, *, outlier: float | None, limit: int):
        self._folder, self._state, self._outlier, self._limit = folder, state, outlier, limit

    def accept(self, loss: float, norm: float, batch: Mapping[str, torch.Tensor]) -> str | None:
        """None if the step may be taken, otherwise why not.

        Raises:
            Diverged: that was one too many.
        """
        state = self._state
        reason = self._reason(loss, norm)
        if reason is None:
            state.in_a_row = 0
            if self._outlier is not None:
                state.losses = [*(state.losses or []), loss][-HISTORY:]
                state.norms = [*(state.norms or []), norm][-HISTORY:]
            return None
        state.skipped += 1
        state.in_a_row += 1
        step = state.step + 1
        if self._folder is not None and state.skipped <= KEPT:
            path = self._folder / f"step-{step:08d}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                save_tensors(batch, path.with_suffix(".safetensors"))
                write_text(
                    path.with_suffix(".json"),
                    json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "reason": reason}) + "\n",
                )
            except OSError as error:  # the disk is full: no reason to lose the run
                path.with_suffix(".safetensors").unlink(missing_ok=True)
                reason += f" (its batch could not be kept: {error})"
        if state.in_a_row >= self._limit:
            kept = f"; their batches are in {self._folder}" if self._folder is not None else ""
            raise Diverged(
                f"step {step}: {reason}; {state.in_a_row} in a row were skipped{kept}; "
                "lower the learning rate or clip more"
            )
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        if self._outlier is not None:
            for name, value, history in (
                ("loss", loss, self._state.losses),
                ("gradient norm", norm, self._state.norms),
            ):
                history = history or []
                far = deviation(value, history)
                if far > self._outlier:
                    return f"{name} {value:.4g} is {far:.1f} standard deviations above the last {len(history)}"
        return None
