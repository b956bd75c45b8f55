"""What a run measures of itself, step by step, and where that goes: metrics.jsonl and the display."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoints.checkpoint import State
from ..config import TrainingConfig
from ..evaluate import Evaluation
from ..schedule import progress
from .progress import PHASES, Display, Metrics, duration

# Metrics are written and shown this often. A guess.
FLUSH_SECONDS = 1.0


def finite(value: float | None) -> float | None:
    """``value``, or None where it is not finite: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


class Timer:
    """Seconds of a step by :data:`PHASES`, as the host sees them.

    ``backward`` ends when loss and norm are read, so it holds the device's work and the wait for other ranks.
    """

    def __init__(self):
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def start(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What has passed since the last mark belongs to ``phase``."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def own(self) -> float:
        """Seconds before this rank waited for others."""
        return self.seconds["data"] + self.seconds["forward"]


class Meters:
    """Collects the steps' numbers; writes and shows them every :data:`FLUSH_SECONDS`.

    Args:
        folder: of the run; None: nothing is written (a rank but the first).
    """

    def __init__(
        self, folder: Path | None, display: Display, training: TrainingConfig, state: State, flops_per_token: float,
        peak: float,
    ):  # fmt: skip
        self._display, self._training, self._state = display, training, state
        self._flops_per_token, self._peak = flops_per_token, peak
        self._metrics = Metrics(folder, state.step, training.wandb) if folder is not None else None
        self._pending: list[dict] = []
        self._flushed = (state.tokens, state.seconds)
        # Mean loss and tokens per second over the steps written last.
        self._recent: tuple[float, float] | None = None
        self._validation: Evaluation | None = None

    def step(
        self, scale: float, values: Mapping[str, float], timer: Timer, skipped: str | None, own: Sequence[float]
    ) -> None:
        """Note the step that ``state`` now stands after.

        Args:
            scale: what the peak learning rates were multiplied with.
            values: loss, grad_norm and the loss's terms.
            skipped: why no update was made.
            own: each rank's :attr:`Timer.own`.
        """
        state, training = self._state, self._training
        line = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 4)}
        line |= {name: finite(value) for name, value in values.items()}
        line |= {"lr": scale * training.lr, "muon_lr": scale * training.muon_lr}
        line |= {f"{phase}_seconds": round(seconds, 6) for phase, seconds in timer.seconds.items()}
        if len(own) > 1:
            line["rank_skew_seconds"] = round(max(own) - min(own), 6)
            line["slowest_rank"] = max(range(len(own)), key=own.__getitem__)
        line["skipped"] = state.skipped
        if skipped is not None:
            line["skipped_because"] = skipped
            self._display.say(f"step {state.step} skipped: {skipped}")
        self._pending.append(line)
        if state.seconds - self._flushed[1] >= FLUSH_SECONDS:
            self.flush()

    def flush(self, seconds: float | None = None) -> None:
        """Write the steps since the last flush."""
        if not self._pending:
            return
        state, last = self._state, self._pending[-1]
        seconds = state.seconds if seconds is None else seconds
        rate = (last["tokens"] - self._flushed[0]) / max(seconds - self._flushed[1], 1e-9)
        self._flushed = (last["tokens"], seconds)
        for line in self._pending:
            line["tokens_per_second"] = round(rate, 1)
            line["mfu"] = round(self._flops_per_token * rate / self._peak, 6)
        losses = [line["loss"] for line in self._pending if line["loss"] is not None]
        if losses:
            self._recent = (sum(losses) / len(losses), rate)
        lines, self._pending = self._pending, []
        if self._metrics is not None:
            self._metrics.write(lines)
        self.show()

    def evaluation(self, result: Evaluation) -> None:
        """Note a score of the state as it is."""
        self.flush()
        self._validation, state = result, self._state
        if self._metrics is not None:
            self._metrics.write(
                [{"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 4),
                  "validation_loss": finite(result.loss), "validation_tokens": result.tokens,
                  **{f"validation_{name}": finite(score) for name, score in result.scores.items()}}]
            )  # fmt: skip

    def show(self, force: bool = False) -> None:
        """Bring the display up to date."""
        if self._recent is None:
            return
        loss, rate = self._recent
        config, state = self._training, self._state
        done = progress(config, state.step, state.seconds)
        left = state.seconds * (1 - done) / done if done > 0 else 0.0
        parts = [
            f"step {state.step}" + (f"/{config.steps}" if config.steps else ""),
            f"loss {loss:.3f}",
            f"validation {self._validation.headline()}" if self._validation else "",
            f"{rate:,.0f} tok/s",
            f"MFU {self._flops_per_token * rate / self._peak:.1%}",
            f"skipped {state.skipped}" if state.skipped else "",
            f"ETA {duration(max(left, 0.0))}",
        ]
        self._display.update(done, "  ".join(filter(None, parts)), force=force)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
