"""The training loop: a run is a function that returns a :class:`Result`."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import InputError, build
from ..data import Dataset, derive_seed, load_dataset, open_dataset
from ..files import whole_folder, write_text
from ..models import Transformer
from ..version import __version__
from .checkpoint import State, find_checkpoint, load_checkpoint, save_checkpoint, save_model, write_manifest
from .clock import Clock, StopRequest
from .config import RunConfig, TrainingConfig, read_run_config
from .evaluate import Evaluation
from .measure import autocast, faster_dtype, keep_random_state, matmul_flops
from .objectives import Batch, CausalLM, rows_of, to_device
from .optimizer import Optimizers
from .progress import Display, Metrics, duration
from .report import plot_loss, write_samples
from .schedule import lr_scale, progress
from .step import train_step

CONFIG = "config.toml"
RUNS = Path("runs")
# Losses are read back from the device, written and shown this often: each time it waits for the work that is queued.
FLUSH_SECONDS = 1.0


class Diverged(RuntimeError):
    """The loss is not a finite number any more."""


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


class Run:
    """A run in a folder: its settings, data, model, optimisers and place. :meth:`train` takes it to its end."""

    def __init__(self, config: RunConfig, folder: Path, dataset: Dataset, display: Display, checkpoint: Path | None):
        self.folder, self.dataset, self.display = folder, dataset, display
        self.device = pick_device(config.training.device)
        training = config.training.with_budget()
        self.objective = CausalLM(dataset, config.model.context_length, training.batch_size, training.seed)
        if checkpoint is None:
            with keep_random_state(self.device):
                torch.manual_seed(derive_seed(training.seed, "weights"))
                self.model = Transformer(config.model).to(self.device)
            self.optimizers = Optimizers(self.model, training)
            self.state = State(step=0, seconds=0.0, tokens=0, dtype=training.dtype, data=dataset.train.sha256)
        else:
            self.model, tensors, self.state = load_checkpoint(checkpoint, self.device)
            if self.state.data != dataset.train.sha256:
                raise InputError(f"{checkpoint}: made from other training tokens than {dataset.train.path}")
            if self.model.config != config.model:
                raise InputError(f"{checkpoint}: another model than in {folder / 'config.toml'}")
            self.optimizers = Optimizers(self.model, training)
            self.optimizers.load_state_dict(tensors)
        self.model.train()
        self.model.checkpoint_activations = training.checkpoint_activations
        self.config = replace(config, training=training)
        self._pending: list[tuple] = []
        # Mean loss and tokens per second over the steps written last.
        self._recent: tuple[float, float] | None = None
        self._validation: Evaluation | None = None
        # At which step the last evaluation was made, and over how many tokens.
        self._evaluated: tuple[int, int] | None = None

    def measure(self) -> None:
        """Measure the device; say and record what will be trained, where and how."""
        measured = {}
        if self.state.dtype == "auto":
            self.state.dtype, measured = faster_dtype(self.objective, self.model, self._sample())
        self.peak = matmul_flops(self.device, self.state.dtype)
        self.flops_per_token = self.model.flops_per_token(self.config.model.context_length)
        environment = {
            "step": self.state.step,
            "fastllm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "dtype": self.state.dtype,
            "seconds_per_forward_backward": measured,
            "matmul_flops": self.peak,
            "flops_per_token": self.flops_per_token,
            "parameters": self.model.num_parameters(),
        }
        with open(self.folder / "sessions.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(environment) + "\n")
        say = self.display.say
        say(self.config.to_toml())
        if self.state.step:
            say(f"resuming after step {self.state.step}")
        say(self.dataset.describe())
        say(f"model: {self.model.num_parameters():,} parameters on {self.device}")
        if measured:
            times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in measured.items())
            say(f"precision: {self.state.dtype}, forward and backward measured: {times}")
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
            Diverged: the loss is not finite.
            OSError: something cannot be written.
        """
        config, state = self.config.training, self.state
        losses = self._losses()
        self._clock = Clock(self.device, state.seconds)
        self._metrics = Metrics(self.folder, state.step)
        self._flushed = (state.tokens, state.seconds)
        saved = None
        try:
            with StopRequest() as stop, self.display, keep_random_state(self.device):
                while (done := progress(config, state.step, self._clock.seconds)) < 1.0 and not stop.signal:
                    scale = lr_scale(config, done)
                    self.optimizers.set_scale(scale)
                    # Dropout is a function of (seed, step): it needs no saved state, and nothing else can shift it.
                    torch.manual_seed(derive_seed(config.seed, "dropout", state.step))
                    batch = self.objective.batch(state.step)
                    loss, norm, terms = train_step(
                        self.objective, self.model, self.optimizers, batch,
                        rows=config.rows, clip=config.clip, dtype=state.dtype, losses=losses,
                    )  # fmt: skip
                    state.step += 1
                    state.tokens += self.objective.tokens(batch)
                    state.seconds = self._clock.seconds
                    self._pending.append(
                        (state.step, state.tokens, state.seconds, scale, {**terms, "loss": loss, "grad_norm": norm})
                    )
                    if state.seconds - self._flushed[1] >= FLUSH_SECONDS:
                        self._flush()
                    if config.eval_interval and state.step % config.eval_interval == 0:
                        self._evaluate(config.eval_windows)
                    if config.checkpoint_interval and state.step % config.checkpoint_interval == 0:
                        with self._clock.pause():
                            self._save()
                        saved = state.step
                self._flush()
                if not stop.signal and self._evaluated != (state.step, len(self.dataset.validation) - 1):
                    self._evaluate(limit=0)
                self._show(force=True)
                if saved != state.step:
                    self._save()
        finally:
            self._metrics.close()
        if stop.signal:
            self.display.say(f"{signal.Signals(stop.signal).name}: saved after step {state.step}; to go on:")
            self.display.say(f"  fastllm train --resume {shlex.quote(str(self.folder))}")
        else:
            self._finish()
        validation = self._validation
        return Result(
            folder=self.folder, steps=state.step, seconds=state.seconds,
            validation_loss=validation and validation.loss,
            validation_bits_per_byte=validation and validation.bits_per_byte,
            xz_bits_per_byte=self.dataset.summary.xz_bits_per_byte, signal=stop.signal,
        )  # fmt: skip

    def _losses(self) -> Callable:
        """The objective's losses, compiled where asked for: now, so that compiling is no training time."""
        if not self.config.training.compile:
            return self.objective.losses
        compiled = torch.compile(self.objective.losses)
        with keep_random_state(self.device), autocast(self.device, self.state.dtype):
            sum(compiled(self.model, self._sample()).values()).backward()
        self.model.zero_grad(set_to_none=True)
        return compiled

    def _flush(self) -> None:
        """Write the steps since the last flush; the only place that reads losses back from the device."""
        if not self._pending:
            return
        # One read for all.
        scalars = [[value.float() for value in values.values()] for *_, values in self._pending]
        read = torch.stack([torch.stack(row) for row in scalars]).tolist()
        seconds, tokens = self._clock.seconds, self._pending[-1][1]
        rate = (tokens - self._flushed[0]) / max(seconds - self._flushed[1], 1e-9)
        self._flushed = (tokens, seconds)
        training, lines = self.config.training, []
        for (step, tokens, seconds, scale, values), row in zip(self._pending, read, strict=True):
            values = dict(zip(values, row, strict=True))
            loss, norm = values["loss"], values["grad_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}; lower the learning rate or clip more")
            lines.append(
                {"step": step, "tokens": tokens, "seconds": round(seconds, 4), **values,
                 "lr": scale * training.lr, "muon_lr": scale * training.muon_lr,
                 "tokens_per_second": round(rate, 1)}
            )  # fmt: skip
        self._metrics.write(lines)
        self._pending.clear()
        self._recent = (sum(line["loss"] for line in lines) / len(lines), rate)
        self._show()

    def _show(self, force: bool = False) -> None:
        if self._recent is None:
            return
        loss, rate = self._recent
        config, state = self.config.training, self.state
        done = progress(config, state.step, state.seconds)
        left = state.seconds * (1 - done) / done if done > 0 else 0.0
        validation = self._validation
        parts = [
            f"step {state.step}" + (f"/{config.steps}" if config.steps else ""),
            f"loss {loss:.3f}",
            f"validation {validation.headline()}" if validation else "",
            f"{rate:,.0f} tok/s",
            f"MFU {self.flops_per_token * rate / self.peak:.1%}",
            f"ETA {duration(max(left, 0.0))}",
        ]
        self.display.update(done, "  ".join(filter(None, parts)), force=force)

    def _evaluate(self, limit: int) -> None:
        """Score the validation split, or ``limit`` windows of it; the clock stands meanwhile."""
        training, state = self.config.training, self.state
        self._flush()
        with self._clock.pause():
            result = self.objective.evaluate(self.model, training.rows, state.dtype, limit)
        self._validation, self._evaluated = result, (state.step, result.tokens)
        self._metrics.write(
            [{"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 4),
              "validation_loss": result.loss, "validation_tokens": result.tokens,
              **{f"validation_{name}": score for name, score in result.scores.items()}}]
        )  # fmt: skip

    def _save(self) -> None:
        self._flush()  # refuses to save what has diverged
        save_checkpoint(
            self.folder / "checkpoints", self.model, self.dataset.tokenizer, self.optimizers, self.state,
            self.config.training.keep_checkpoints,
        )  # fmt: skip

    def _finish(self) -> None:
        """The model's folder, the picture, the samples, and the result in words."""
        state, say = self.state, self.display.say
        with whole_folder(self.folder / "model") as folder:
            save_model(folder, self.model, self.dataset.tokenizer)
            write_manifest(folder)
        xz = self.dataset.summary.xz_bits_per_byte
        plot_loss(
            self.folder, self.dataset,
            f"{self.dataset.summary.name}: {self.model.num_parameters() / 1e6:.2f}M parameters, "
            f"{state.step:,} steps, {state.tokens:,} tokens",
        )  # fmt: skip
        samples = write_samples(self.folder, self.model, self.dataset, self.config.training.seed)
        say()
        say(samples)
        say(
            f"{state.step:,} steps, {state.tokens:,} tokens ({state.tokens / len(self.dataset.train):.1f} epochs), "
            f"{state.seconds:.1f} s of training, {state.tokens / max(state.seconds, 1e-9):,.0f} tok/s"
        )
        say(
            f"validation: {self._validation.bits_per_byte:.4f} bits per byte "
            f"({self._validation.loss:.4f} nats per token, {self._validation.tokens:,} tokens)"
        )
        if xz is None:
            say("xz -9 primed with the training text: not computed for so long a text")
        else:
            say(f"xz -9 primed with the training text: {xz:.4f} bits per byte")
        say(f"in {self.folder}: model/, loss.png, samples.txt, metrics.jsonl, config.toml")


def train(config: RunConfig, folder: str | Path | None = None, *, quiet: bool = False) -> Result:
    """Train from scratch in ``folder``, which is made and must not hold a run yet; None: the next free runs/NNNN.

    Raises:
        InputError: the settings, the text and the folder do not allow it; nothing has been trained then.
        Diverged: the loss is not finite any more.
        OSError: something cannot be written.
    """
    if folder is not None and (Path(folder) / "checkpoints").exists():
        raise InputError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
    pick_device(config.training.device)
    with _new_folder(folder) as folder:
        display = Display(quiet)
        dataset = load_dataset(config.data, folder / "data", vocab_size=config.model.vocab_size, say=display.say)
        model = replace(config.model, vocab_size=dataset.tokenizer.vocab_size)
        run = Run(replace(config, model=model), folder, dataset, display, None)
        write_text(folder / CONFIG, run.config.to_toml())
        run.measure()
    return run.train()


def _next_run() -> Path:
    numbers = [int(path.name) for path in RUNS.glob("[0-9]*") if path.name.isdigit()]
    return RUNS / f"{max(numbers, default=0) + 1:04d}"


@contextlib.contextmanager
def _new_folder(name: str | Path | None) -> Iterator[Path]:
    """Make the run's folder; if the block raises, remove what was not there before."""
    folder = Path(name) if name is not None else _next_run()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=name is not None)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"{folder}: cannot write there: {error.strerror}") from error
        yield folder
    except BaseException:
        if made:
            shutil.rmtree(made[-1], ignore_errors=True)
        raise


def resume(checkpoint: str | Path, changes: Mapping[str, object] | None = None, *, quiet: bool = False) -> Result:
    """Go on with a run, exactly as if it had not stopped.

    Args:
        checkpoint: the run's folder (its newest checkpoint is taken), or one checkpoint in it.
        changes: fields of TrainingConfig marked ``resume``, with new values; they are saved with the run.

    Raises:
        InputError: there is no whole checkpoint, or something of the run's folder does not fit it.
        Diverged, OSError: as for :func:`train`.
    """
    path = find_checkpoint(checkpoint).resolve()
    folder = path.parent.parent if path == Path(checkpoint).resolve() else Path(checkpoint)
    config = read_run_config(folder / CONFIG)
    if changes:
        config = replace(config, training=build(TrainingConfig, changes, "command line", config.training))
    run = Run(config, folder, open_dataset(folder / "data"), Display(quiet), path)
    write_text(folder / CONFIG, run.config.to_toml())
    run.measure()
    return run.train()
