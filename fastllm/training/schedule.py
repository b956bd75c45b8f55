"""The learning rate over a run, as a function of the part of it that is over."""

from __future__ import annotations

import math

from .config import TrainingConfig


def progress(config: TrainingConfig, step: int, seconds: float) -> float:
    """The part of the run that is over after ``step`` steps and ``seconds`` of training, whichever budget is nearer."""
    done = 0.0
    if config.steps is not None:
        done = step / config.steps
    if config.max_seconds is not None:
        done = max(done, seconds / config.max_seconds)
    return done


def lr_scale(config: TrainingConfig, done: float) -> float:
    """What the peak learning rates are multiplied with when the part ``done`` of the run is over.

    A linear warm-up over ``warmup``, then linear or cosine (Loshchilov and Hutter 2017) decay to ``min_lr``; or
    constant with a linear decay over the last ``decay`` (warm-up, stable, decay: Hu et al. 2024). At the very start
    it is a hundredth of the warm-up's end, so that the first step is not lost.
    """
    done = min(max(done, 0.0), 1.0)
    if done < config.warmup:
        return max(done / config.warmup, 0.01)
    if config.schedule == "wsd":
        left = min(1.0, (1 - done) / config.decay)
    else:
        left = (1 - done) / (1 - config.warmup)
        if config.schedule == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
    return config.min_lr + (1 - config.min_lr) * left
