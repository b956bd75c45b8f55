"""The training loop: steps, evaluations and checkpoints from where a run stands to its budget's end or a signal."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import cpu
from ..data import derive_seed
from ..other_work import OtherWork
from .checkpoints.checkpoint import Keep
from .checkpoints.saving import NotFinite
from .clock import Clock, StopRequest
from .device import autocast, keep_random_state
from .evaluate import Evaluation
from .guard import Diverged, Failed, Guard
from .loss_scale import LossScale
from .reports.meters import Meters, Timer, finite
from .run import Measured, Result, Run
from .schedule import lr_scale, progress
from .step import Step, StepSettings, batch_gradients


class DataChanged(Failed):
    """The file that a run reads was changed under it."""


class Reading(NamedTuple):
    """A step's numbers on the host, and what the ranks tell each other with them.

    ``values``: loss, gradient norm and the loss's terms by name. ``signal``: number of the signal that some rank was
    sent, 0 without one. ``seconds``: of training, on the first rank's clock. ``own``: each rank's seconds before it
    waited for others.
    """

    values: dict[str, float]
    signal: int
    seconds: float
    own: list[float]


class Session:
    """One process's stretch of training of a :class:`~fastllm.training.run.Run`.

    Args:
        run: what is trained. Its ``state`` moves on with every step.
        measured: what the run's meters compare with.
    """

    def __init__(self, run: Run, measured: Measured):
        config, state, ranks = run.config.training, run.state, run.ranks
        main = ranks.rank == 0
        self.run, self.config, self.state, self.ranks = run, config, state, ranks
        self.losses = self._compiled()
        self.clock, self.timer, self.stop = Clock(run.device, state.seconds), Timer(), StopRequest()
        # With several ranks the first one's seconds, as of the last step: all must decide alike.
        self.agreed_seconds = state.seconds
        self.signal = 0
        self.validation: Evaluation | None = None
        # At which step the last evaluation was made, and whether on all there is.
        self.evaluated: tuple[int, bool] | None = None
        self.meters = Meters(
            run.folder if main else None, run.display, config, state, measured.flops_per_token,
            measured.peak * ranks.size,
        )  # fmt: skip
        self.guard = Guard(
            run.folder / "skipped" if main else None, state, outlier=config.outlier, limit=config.max_skipped
        )
        self.loss_scale = LossScale(state)
        self.saver = ranks.saver(
            run.folder / "checkpoints", run.model, run.dataset.tokenizer,
            Keep(config.keep_checkpoints, max(config.keep_best, min(config.patience, 1))), run.display.warn,
        )  # fmt: skip
        # Several ranks on one machine would take one another for others.
        self.other_work = OtherWork(torch.get_num_threads()) if ranks.size == 1 and run.device.type == "cpu" else None
        self.sizes = {path: os.stat(path).st_size for path in run.dataset.train.path.parent.glob("*.bin")}

    def train(self) -> None:
        """Step until the budget is spent or a signal comes; evaluate and save at the end.

        Raises:
            Diverged: too many steps in a row were skipped; what was reached before them is saved.
            DataChanged: the training tokens were changed under the run; it is saved.
            OSError: something cannot be written.
        """
        try:
            with self.stop, self.run.display, keep_random_state(self.run.device):
                try:
                    while not self._over(done := progress(self.config, self.state.step, self.now())):
                        self._one_step(done)
                        complaint = self.other_work and self.other_work.complaint()
                        if complaint:
                            self.run.display.warn(complaint)
                        self.saver.poll()
                except (Diverged, DataChanged):
                    # The weights are those of the last step that was taken: nothing need be lost.
                    with contextlib.suppress(NotFinite):
                        self._save(final=True)
                    raise
                self.meters.flush(self.now())
                if not self.signal and self.evaluated != (self.state.step, True):
                    self._evaluate(limit=0)
                self.meters.show(force=True)
                self._save(final=True)
        finally:
            # The error that is on its way, if any, is the one to see.
            with contextlib.suppress(*([OSError] if sys.exc_info()[0] else [])):
                self.meters.close()

    def now(self) -> float:
        """Seconds of training."""
        return self.clock.seconds if self.ranks.size == 1 else self.agreed_seconds

    def _one_step(self, done: float) -> None:
        """The next step, and the evaluation and the checkpoint that are due after it."""
        run, config, state, timer = self.run, self.config, self.state, self.timer
        scale = lr_scale(config, done)
        run.optimizers.set_scale(scale)
        timer.start()
        self._check_data()
        self.ranks.beat(state.step, "data")
        batch = run.objective.batch(state.step, done)
        timer.mark("data")
        self.ranks.beat(state.step, "step")
        # Dropout is a function of (seed, step, row): it needs no saved state, and nothing else can shift it.
        seed = derive_seed(config.seed, "dropout", state.step)
        settings = StepSettings(run.rows(batch), config.clip, state.dtype, seed, self.loss_scale.value)
        step = batch_gradients(
            run.objective, run.model, batch, settings, losses=self.losses, ranks=self.ranks, mark=timer.mark
        )
        reading = self._read(step)
        self.signal, self.agreed_seconds = reading.signal, reading.seconds
        loss, norm = reading.values["loss"], reading.values["grad_norm"]
        skipped = self.loss_scale.overflow(loss, norm) or self.guard.accept(loss, norm, batch)
        timer.mark("backward")
        if skipped is None:
            run.optimizers.step()
            run.average.update(state.step)
        else:
            run.optimizers.zero_grad()
        timer.mark("update")
        state.step += 1
        state.tokens += run.objective.tokens(batch)
        state.seconds = self.now()
        state.validation = state.score = None
        self.meters.step(scale, reading.values, timer, skipped, reading.own)
        self.ranks.beat(state.step, "evaluation or checkpoint")
        if config.eval_interval and state.step % config.eval_interval == 0:
            self._evaluate(config.eval_windows)
        if config.checkpoint_interval and state.step % config.checkpoint_interval == 0:
            self._save()

    def _read(self, step: Step) -> Reading:
        """Wait for the step's numbers, and hear the other ranks."""
        values = {**step.terms, "loss": step.loss, "grad_norm": step.norm}
        numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
        everyone = self.ranks.gather([self.stop.signal, self.clock.seconds, self.timer.own])
        return Reading(
            values=dict(zip(values, numbers, strict=True)),
            signal=int(max(signal for signal, _, _ in everyone)),
            seconds=everyone[0][1],
            own=[own for _, _, own in everyone],
        )

    def _check_data(self) -> None:
        """Reading a mapped file beyond its new end would kill the process without a word."""
        for path, before in list(self.sizes.items()):
            try:
                size = os.stat(path).st_size
            except FileNotFoundError:
                self.run.display.warn(
                    f"{path}: deleted during the run, which goes on with what it had opened; the run cannot be resumed "
                    "without it"
                )
                del self.sizes[path]  # what is mapped stays readable until the run ends
                continue
            if size != before:
                raise DataChanged(f"{path}: {before:,} bytes when the run began, now {size:,}")

    def _compiled(self) -> Callable:
        """The objective's losses, compiled where asked for: now, so that compiling is no training time."""
        run, losses = self.run, self.run.objective.losses
        if self.config.compile:
            # Inductor's own random numbers would give other dropout masks than an uncompiled step has.
            losses = cpu.compiled(losses, options={"fallback_random": True})
            # Windows may become longer on the way.
            stages = map(run.sample, (progress(self.config, self.state.step, self.state.seconds), 1.0))
            samples = {next(iter(sample.values())).shape: sample for sample in stages}
            with keep_random_state(run.device), autocast(run.device, self.state.dtype):
                for sample in samples.values():
                    torch.stack([*losses(run.model, sample).values()]).sum().backward()
            run.model.zero_grad(set_to_none=True)
        return losses

    def _evaluate(self, limit: int) -> None:
        """Score the validation split, or ``limit`` windows of it; the clock stands meanwhile."""
        run, state = self.run, self.state
        with self.clock.pause(), run.average.applied(), self.ranks.evaluating():
            result = run.objective.evaluate(run.model, self.config.rows, state.dtype, limit)
        self.validation, self.evaluated = result, (state.step, result.whole)
        state.validation, state.score = finite(result.loss), finite(result.signed_score)
        if self.config.patience:
            self._compare()
        self.meters.evaluation(result)

    def _compare(self) -> None:
        """Save the state of now where its score is the best up to now, and count the evaluations since it."""
        state = self.state
        if state.score is not None and (state.best is None or state.score > state.best):
            state.best, state.waited = state.score, 0
            self._save()
        else:
            state.waited += 1

    def _over(self, done: float) -> bool:
        """Whether training ends here: the part ``done`` of the budget is spent, patience is at its end, or a signal."""
        patience = self.config.patience
        return done >= 1.0 or bool(self.signal) or 0 < patience <= self.state.waited

    def _save(self, final: bool = False) -> None:
        """Begin to save what there is now; wait for it at the end, or where training is not to go on meanwhile."""
        seconds = self.now()
        with self.clock.pause():
            self.run.keep_folder()
            # A checkpoint has the metrics of all its steps on the disk before it.
            self.meters.flush(seconds)
            if self.saver.saved != self.state.step and self.saver.saving != self.state.step:
                with self.run.average.applied() as trained:
                    self.saver.save(self.state, {**self.run.optimizers.state_dict(), **trained})
            if final or not self.config.background_saving:
                self.saver.wait(final)


def train_run(run: Run, measured: Measured) -> Result:
    """Train ``run`` until its budget is spent or a signal comes; save; draw and sample at the end.

    Raises:
        Diverged, DataChanged, OSError: as for :meth:`Session.train`.
    """
    session = Session(run, measured)
    session.train()
    state, validation = run.state, session.validation
    if session.signal:
        run.display.say(f"{signal.Signals(session.signal).name}: saved after step {state.step}; to go on:")
        run.display.say(f"  fastllm train --resume {shlex.quote(str(run.folder))}")
    else:
        run.average.take()
        if run.config.training.patience:
            validation = run.take_best() or validation
        assert validation is not None  # a run ends with one
        run.finish(validation)
    return Result(
        folder=run.folder, steps=state.step, seconds=state.seconds, validation_loss=validation and validation.loss,
        validation_bits_per_byte=validation and validation.bits_per_byte,
        xz_bits_per_byte=run.dataset.summary.xz_bits_per_byte, signal=session.signal,
    )  # fmt: skip
