"""The training loop: a run is a function that returns a :class:`Result`."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import cpu
from ..config import InputError, settings
from ..data import Dataset, derive_seed
from ..files import whole_folder
from ..matmul import matmul_flops
from ..models import build_model
from ..version import __version__
from .checkpoint import Keep, State, check_settings, load_config, read_state, save_model, write_manifest
from .clock import Clock, StopRequest
from .config import RunConfig, TrainingConfig
from .dropout import key_dropout
from .evaluate import Evaluation
from .guard import Diverged, Failed, Guard
from .lora import ADAPTER, load_adapter
from .measure import autocast, faster_dtype, keep_random_state
from .meters import Meters, Timer, finite
from .objectives import Batch, make_objective, rows_of, to_device
from .optimizer import Optimizers
from .progress import Display
from .ranks import ALONE, Ranks
from .report import plot_loss, write_samples
from .saving import NotFinite
from .schedule import lr_scale, progress
from .setup import new_model
from .step import train_step

CONFIG = "config.toml"
SESSIONS = "sessions.jsonl"


@dataclass(frozen=True)
class Result:
    """How a run ended. ``signal`` is the number of the signal that stopped it early, 0 if it came to its end."""

    folder: Path
    steps: int
    seconds: float
    validation_loss: float | None
    validation_bits_per_byte: float | None
    xz_bits_per_byte: float | None
    signal: int = 0


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA where it is available.

    Raises:
        InputError: CUDA was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch.cuda.is_available() is False")
    return torch.device(name)


class DataChanged(Failed):
    """The file that a run reads was changed under it."""


def fixed_settings(training: TrainingConfig) -> dict[str, object]:
    """What may not change when a run is resumed."""
    free = {setting.name for setting in settings(TrainingConfig) if setting.metadata.get("resume")}
    return {name: value for name, value in asdict(training).items() if name not in free}


class Run:
    """A run in a folder: its settings, data, model, optimisers and place. :meth:`train` takes it to its end."""

    def __init__(
        self, config: RunConfig, folder: Path, dataset: Dataset, display: Display, checkpoint: Path | None,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.folder, self.dataset, self.display, self.ranks = folder, dataset, display, ranks
        self.device = ranks.device(pick_device(config.training.device))
        if config.objective.lora_rank and ranks.size > 1:
            raise InputError(f"lora_rank: adapters are trained by one process, not by {ranks.size}")
        training = config.training.with_budget()
        self.objective = make_objective(
            config.objective, dataset, config.model.context_length, training.batch_size, training.seed
        )
        make = self._make = lambda: build_model(config.model)
        if checkpoint is None:
            with keep_random_state(self.device):
                torch.manual_seed(derive_seed(training.seed, "weights"))
                dtype = ranks.dtype(training.dtype)
                self.model = ranks.build(lambda: new_model(config), self.device, dtype)
            self.optimizers = Optimizers(self.model, training)
            self.state = State(step=0, seconds=0.0, tokens=0, dtype=dtype, data=dataset.train.sha256)
        else:
            self.state = read_state(checkpoint)
            if self.state.data != dataset.train.sha256:
                raise InputError(f"{checkpoint}: made from other training tokens than {dataset.train.path}")
            check_settings(checkpoint, self.state.settings, fixed_settings(training), folder / CONFIG)
            saved = load_config(checkpoint)
            if saved != config.model:
                raise InputError(f"{checkpoint}: another model than in {folder / CONFIG}")
            self.model, tensors = ranks.load(checkpoint, make, self.device, self.state.dtype)
            if config.objective.lora_rank:  # whose weights are merged
                with keep_random_state(self.device):
                    self.model = new_model(config).to(self.device)
                load_adapter(self.model, checkpoint / ADAPTER)
            self.optimizers = Optimizers(self.model, training)
            try:
                self.optimizers.load_state_dict(tensors)
            except ValueError as error:
                raise InputError(f"{checkpoint}: {error}") from error
        self.state.settings = fixed_settings(training)
        key_dropout(self.model).train()
        ranks.attach(self.model, self.objective)
        self.model.checkpoint_activations = training.checkpoint_activations
        self.config = replace(config, training=training)
        self._validation: Evaluation | None = None
        # At which step the last evaluation was made, and whether on all there is.
        self._evaluated: tuple[int, bool] | None = None

    def measure(self) -> None:
        """Measure the device; say and record what will be trained, where and how."""
        measured = {}
        auto = self.state.dtype == "auto"
        if auto:
            self.state.dtype, measured = faster_dtype(self.objective, self.model, self._sample())
        before, self.state.cpu = self.state.cpu, cpu.kind() if self.device.type == "cpu" else None
        self.peak = matmul_flops(self.device, getattr(torch, self.state.dtype))
        self.flops_per_token = self.model.flops_per_token(self.config.model.context_length)
        environment = {
            "step": self.state.step,
            "fastllm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "cpu": self.state.cpu,
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
            "dtype": self.state.dtype,
            "seconds_per_forward_backward": measured,
            "matmul_flops": self.peak,
            "flops_per_token": self.flops_per_token,
            "parameters": self.model.num_parameters(),
        }
        if self.ranks.rank == 0:
            with open(self.folder / SESSIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(environment) + "\n")
        say = self.display.say
        say(self.config.to_toml())
        if self.state.step:
            say(f"resuming after step {self.state.step}")
            if before and self.state.cpu and before != self.state.cpu:
                say(
                    f"another CPU than before ({before}): {self.state.cpu}; the run keeps {self.state.dtype}, Muon "
                    f"multiplies in {cpu.precision(self.device)}"
                )
        say(self.dataset.describe())
        say(f"model: {self.model.num_parameters():,} parameters on {self.device}{self.ranks.describe()}")
        if measured:
            times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in measured.items())
            say(f"precision: {self.state.dtype}, forward and backward measured: {times}")
        elif auto:
            say(f"precision: {self.state.dtype}, for this CPU ({cpu.level()}) has no products of bfloat16")
        say(
            f"MFU = {self.flops_per_token / 1e6:.1f} MFLOP/token (6 N + attention) x tokens/s / "
            f"{self.peak / 1e9:,.0f} GFLOP/s (matrix product measured here, {self.state.dtype})"
        )

    def _sample(self) -> Batch:
        """A forward pass's worth of the next batch, for measuring and compiling."""
        part = rows_of(self.objective.batch(self.state.step), self.config.training.rows)[0]
        return to_device(part, self.device)

    def train(self) -> Result:
        """Step until the budget is spent or a signal comes; save; draw and sample at the end.

        Raises:
            Diverged: too many steps in a row were skipped; what was reached before them is saved.
            DataChanged: the training tokens were changed under the run; it is saved.
            OSError: something cannot be written.
        """
        config, state, ranks = self.config.training, self.state, self.ranks
        main = ranks.rank == 0
        self._losses = self._compiled()
        self._clock, self._timer = Clock(self.device, state.seconds), Timer()
        self._meters = Meters(
            self.folder if main else None, self.display, config, state, self.flops_per_token, self.peak * ranks.size
        )
        self._guard = Guard(
            self.folder / "skipped" if main else None, state, outlier=config.outlier, limit=config.max_skipped
        )
        self._saver = ranks.saver(
            self.folder / "checkpoints", self.model, self.dataset.tokenizer,
            Keep(config.keep_checkpoints, config.keep_best), self.display.warn,
        )  # fmt: skip
        self._sizes = {path: os.stat(path).st_size for path in self.dataset.train.path.parent.glob("*.bin")}
        try:
            with StopRequest() as self._stop, self.display, keep_random_state(self.device):
                self._signal = 0
                self._seconds = state.seconds
                try:
                    while (done := progress(config, state.step, self._now())) < 1.0 and not self._signal:
                        self._one_step(done)
                        self._saver.poll()
                except (Diverged, DataChanged):
                    # The weights are those of the last step that was taken: nothing need be lost.
                    with contextlib.suppress(NotFinite):
                        self._save(final=True)
                    raise
                self._meters.flush(self._now())
                if not self._signal and self._evaluated != (state.step, True):
                    self._evaluate(limit=0)
                self._meters.show(force=True)
                self._save(final=True)
        finally:
            # The error that is on its way, if any, is the one to see.
            with contextlib.suppress(*([OSError] if sys.exc_info()[0] else [])):
                self._meters.close()
        if self._signal:
            self.display.say(f"{signal.Signals(self._signal).name}: saved after step {state.step}; to go on:")
            self.display.say(f"  fastllm train --resume {shlex.quote(str(self.folder))}")
        else:
            self._finish()
        validation = self._validation
        return Result(
            folder=self.folder, steps=state.step, seconds=state.seconds,
            validation_loss=validation and validation.loss,
            validation_bits_per_byte=validation and validation.bits_per_byte,
            xz_bits_per_byte=self.dataset.summary.xz_bits_per_byte, signal=self._signal,
        )  # fmt: skip

    def _now(self) -> float:
        """Seconds of training; with several ranks the first one's, as of the last step: all must decide alike."""
        return self._clock.seconds if self.ranks.size == 1 else self._seconds

    def _one_step(self, done: float) -> None:
        """The next step, and the evaluation and the checkpoint that are due after it."""
        config, state, timer = self.config.training, self.state, self._timer
        scale = lr_scale(config, done)
        self.optimizers.set_scale(scale)
        timer.start()
        self._check_data()
        self.ranks.beat(state.step, "data")
        batch = self.objective.batch(state.step)
        timer.mark("data")
        self.ranks.beat(state.step, "step")
        self._batch = batch
        # Dropout is a function of (seed, step, row): it needs no saved state, and nothing else can shift it.
        train_step(
            self.objective, self.model, self.optimizers, batch, rows=config.rows, clip=config.clip, dtype=state.dtype,
            losses=self._losses, seed=derive_seed(config.seed, "dropout", state.step), ranks=self.ranks,
            accept=self._accept, mark=timer.mark,
        )  # fmt: skip
        state.step += 1
        state.tokens += self.objective.tokens(batch)
        state.seconds = self._now()
        state.validation = None
        self._meters.step(scale, self._values, timer, self._skipped, self._own)
        self.ranks.beat(state.step, "evaluation or checkpoint")
        if config.eval_interval and state.step % config.eval_interval == 0:
            self._evaluate(config.eval_windows)
        if config.checkpoint_interval and state.step % config.checkpoint_interval == 0:
            self._save()

    def _accept(self, loss: torch.Tensor, norm: torch.Tensor, terms: dict[str, torch.Tensor]) -> bool:
        """Read the step's numbers, once; hear the other ranks; ask the guard."""
        values = {**terms, "loss": loss, "grad_norm": norm}
        read = torch.stack([value.detach().float() for value in values.values()]).tolist()
        self._values = dict(zip(values, read, strict=True))
        everyone = self.ranks.gather([self._stop.signal, self._clock.seconds, self._timer.own])
        self._signal = int(max(signal for signal, _, _ in everyone))
        self._seconds = everyone[0][1]
        self._own = [own for _, _, own in everyone]
        self._skipped = self._guard.accept(self._values["loss"], self._values["grad_norm"], self._batch)
        return self._skipped is None

    def _check_data(self) -> None:
        """Reading a mapped file beyond its new end would kill the process without a word."""
        for path, before in list(self._sizes.items()):
            try:
                size = os.stat(path).st_size
            except FileNotFoundError:
                self.display.warn(f"{path}: deleted during the run, which goes on with what it had opened")
                del self._sizes[path]  # what is mapped stays readable until the run ends
                continue
            if size != before:
                raise DataChanged(f"{path}: {before:,} bytes when the run began, now {size:,}")

    def _compiled(self) -> Callable:
        """The objective's losses, compiled where asked for: now, so that compiling is no training time."""
        losses = self.objective.losses
        if self.config.training.compile:
            losses = torch.compile(losses)
            with keep_random_state(self.device), autocast(self.device, self.state.dtype):
                sum(losses(self.model, self._sample()).values()).backward()
            self.model.zero_grad(set_to_none=True)
        return losses

    def _evaluate(self, limit: int) -> None:
        """Score the validation split, or ``limit`` windows of it; the clock stands meanwhile."""
        training, state = self.config.training, self.state
        with self._clock.pause(), self.ranks.evaluating():
            result = self.objective.evaluate(self.model, training.rows, state.dtype, limit)
        self._validation, self._evaluated = result, (state.step, result.whole)
        state.validation = finite(result.loss)
        self._meters.evaluation(result)

    def _save(self, final: bool = False) -> None:
        """Begin to save what there is now; wait for it at the end, or where training is not to go on meanwhile."""
        # A checkpoint has the metrics of all its steps on the disk before it.
        self._meters.flush(self._now())
        with self._clock.pause():
            if self._saver.saved != self.state.step and self._saver.saving != self.state.step:
                self._saver.save(self.state, self.optimizers.state_dict())
            if final or not self.config.training.background_saving:
                self._saver.wait(final)

    def _epochs(self) -> float:
        """How often the training data were seen: by tokens, or by examples."""
        if self.config.objective.kind.task:
            return self.state.step * self.config.training.batch_size / len(self.dataset.train)
        return self.state.tokens / len(self.dataset.train)

    def _finish(self) -> None:
        """The model's folder, the picture, the samples, and the result in words."""
        state, say = self.state, self.display.say
        model = self.ranks.whole(self.model, self._make)
        if model is None:
            return
        with whole_folder(self.folder / "model") as folder:
            save_model(folder, model, self.dataset.tokenizer)
            write_manifest(folder)
        xz = self.dataset.summary.xz_bits_per_byte
        plot_loss(
            self.folder, self.dataset,
            f"{self.dataset.summary.name}: {self.model.num_parameters() / 1e6:.2f}M parameters, "
            f"{state.step:,} steps, {state.tokens:,} tokens",
        )  # fmt: skip
        samples = write_samples(self.folder, model, self.dataset, self.config.training.seed)
        say()
        say(samples)
        say(
            f"{state.step:,} steps, {state.tokens:,} tokens ({self._epochs():.1f} epochs), "
            f"{state.seconds:.1f} s of training, {state.tokens / max(state.seconds, 1e-9):,.0f} tok/s"
        )
        say(f"validation: {self._validation.describe()}")
        if self._validation.bits_per_byte is None:
            pass
        elif xz is None:
            say("xz -9 primed with the training text: not computed for so long a text")
        else:
            say(f"xz -9 primed with the training text: {xz:.4f} bits per byte")
        say(f"in {self.folder}: model/, loss.png, samples.txt, metrics.jsonl, config.toml")
