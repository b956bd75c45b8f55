"""A run: its settings, data, model and optimisers, what it says of itself, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import cpu
from ..backends import chosen_backend
from ..config import InputError, defaults_for, settings
from ..data import derive_seed
from ..files import naming, whole_folder, write_text
from ..matmul import matmul_flops
from ..models import Model, build_model, load_model
from ..version import __version__
from .average import WeightAverage
from .checkpoints.checkpoint import (
    State,
    best_first,
    check,
    check_settings,
    checkpoints,
    load_config,
    read_state,
    save_model,
    write_manifest,
)
from .config import RunConfig, TrainingConfig
from .device import keep_random_state, pick_device
from .dropout import key_dropout
from .evaluate import Evaluation
from .lora import ADAPTER, load_adapter
from .measure import faster_dtype
from .objective import Batch, TrainedModel, row_count, rows_of, to_device
from .objectives import make_objective
from .optimizer import Optimizers
from .parallel.ranks import ALONE, Ranks
from .reports.progress import Display
from .reports.report import plot_loss, write_samples
from .setup import new_model, with_weights

CONFIG = "config.toml"
SESSIONS = "sessions.jsonl"


@dataclass(frozen=True)
class Result:
    """How a run ended. ``signal`` is the number of the signal that stopped it early, or 0 if it finished."""

    folder: Path
    steps: int
    seconds: float
    validation_loss: float | None
    validation_bits_per_byte: float | None
    xz_bits_per_byte: float | None
    signal: int = 0


class Measured(NamedTuple):
    """``peak``: FLOP/s of a matrix product here; ``flops_per_token``: a training step's. MFU is made of both."""

    peak: float
    flops_per_token: float


def fixed_settings(training: TrainingConfig) -> dict[str, object]:
    """What may not change when a run is resumed, and has an effect."""
    free = {setting.name for setting in settings(TrainingConfig) if setting.metadata.get("resume")}
    return {name: value for name, value in asdict(training).items() if name not in {*free, *training.unused()}}


class Run:
    """A run in a folder: data, model, optimisers and place. :func:`.session.train_run` takes it to its end."""

    def __init__(
        self, config: RunConfig, folder: Path, dataset: Any, display: Display, checkpoint: Path | None,
        ranks: Ranks = ALONE, *, keep_lock: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """``keep_lock``: what :func:`fastllm.files.sole_writer` gives to whoever has locked ``folder``."""
        self.folder, self.dataset, self.display, self.ranks = folder, dataset, display, ranks
        self._keep_lock = keep_lock
        self.device = ranks.device(pick_device(config.training.device))
        self.config = config = config.with_budget()
        training = config.training
        self.objective = make_objective(
            config.objective, dataset, config.model.context_length, training.batch_size, training.seed
        )
        self.state, self.model, tensors = self._begin() if checkpoint is None else self._go_on(checkpoint)
        self.optimizers = Optimizers(self.model, training)
        self.average = WeightAverage(self.model, training.ema_decay)
        if checkpoint is not None:
            try:
                self.optimizers.load_state_dict(self.average.load(tensors))
            except ValueError as error:
                raise InputError(f"{checkpoint}: {error}") from error
        self.state.settings = fixed_settings(training)
        key_dropout(self.model).train()
        ranks.attach(self.model, self.objective)
        self.model.checkpoint_activations = training.checkpoint_activations

    def _make(self) -> Model:
        """A new model of this run's shape."""
        return build_model(self.config.model)

    def _begin(self) -> tuple[State, TrainedModel, dict[str, torch.Tensor]]:
        """The state and the model of a new run; there are no tensors of a checkpoint."""
        training = self.config.training
        with keep_random_state(self.device):
            torch.manual_seed(derive_seed(training.seed, "weights"))
            dtype = self.ranks.dtype(training.dtype)
            model = self.ranks.build(self._make, self.device, dtype)
            with_weights(model, self.config, self.ranks)
        state = State(step=0, seconds=0.0, tokens=0, dtype=dtype, data=self.dataset.train.sha256)
        return state, model, {}

    def _go_on(self, checkpoint: Path) -> tuple[State, TrainedModel, dict[str, torch.Tensor]]:
        """The state, the model and the optimisers' tensors of ``checkpoint``, which must be of this run."""
        state, config = read_state(checkpoint), self.config
        if state.data != self.dataset.train.sha256:
            raise InputError(f"{checkpoint}: made from other training tokens than {self.dataset.train.path}")
        check_settings(checkpoint, state.settings, fixed_settings(config.training), self.folder / CONFIG)
        saved = load_config(checkpoint)
        if defaults_for(saved, saved.unused()) != config.model:
            raise InputError(f"{checkpoint}: another model than in {self.folder / CONFIG}")
        model, tensors = self.ranks.load(checkpoint, self._make, self.device, state.dtype)
        if config.objective.lora_rank:  # whose weights are merged
            with keep_random_state(self.device):
                model = new_model(config).to(self.device)
            load_adapter(model, checkpoint / ADAPTER)
        return state, model, tensors

    def measure(self) -> Measured:
        """Measure the device; say and record what will be trained, where and how.

        Raises:
            BackendError: the backend that was asked for cannot serve this model.
        """
        if self.ranks.size == 1 and chosen_backend() != "auto":
            self._try_one_row()
        times = {}
        auto = self.state.dtype == "auto"
        if auto:
            self.state.dtype, times = faster_dtype(self.objective, self.model, self.sample())
        before, self.state.cpu = self.state.cpu, cpu.kind() if self.device.type == "cpu" else None
        measured = Measured(
            peak=matmul_flops(self.device, getattr(torch, self.state.dtype)),
            flops_per_token=self.model.flops_per_token(self.config.model.context_length),
        )
        if self.ranks.rank == 0:
            self._record(measured, times)
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
        if times:
            in_words = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in times.items())
            say(f"precision: {self.state.dtype}, forward and backward measured: {in_words}")
        elif auto:
            say(f"precision: {self.state.dtype}, for this CPU ({cpu.level()}) has no products of bfloat16")
        shape = self.config.model
        attends = "transformer" in (shape.encoder, shape.decoder)
        attention = f" + attention over {shape.context_length:,} tokens" if attends else ""
        say(
            f"MFU = {measured.flops_per_token / 1e6:.1f} MFLOP/token (6 N{attention}) x tokens/s / "
            f"{measured.peak / 1e9:,.0f} GFLOP/s (matrix product measured here, {self.state.dtype})"
        )
        return measured

    def _record(self, measured: Measured, times: dict[str, float]) -> None:
        """Add a line to sessions.jsonl: where this session trains, and what was measured."""
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
            "seconds_per_forward_backward": times,
            "matmul_flops": measured.peak,
            "flops_per_token": measured.flops_per_token,
            "parameters": self.model.num_parameters(),
        }
        path = self.folder / SESSIONS
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(environment) + "\n")

    def _try_one_row(self) -> None:
        """The losses of one sequence: what cannot be computed is refused before anything is written."""
        row = rows_of(self.sample(), 1)[0]
        with keep_random_state(self.device), torch.no_grad():
            self.objective.losses(self.model, row)

    def rows(self, batch: Batch) -> int:
        """Sequences of a forward pass. Where a batch has shorter ones, and so more, a pass has as many tokens."""
        return self.config.training.rows * row_count(batch) // self.config.training.batch_size

    def sample(self, done: float = 1.0) -> Batch:
        """A forward pass's worth of the next batch, for measuring and compiling; ``done`` as for the objective."""
        batch = self.objective.batch(self.state.step, done)
        return to_device(rows_of(batch, self.rows(batch))[0], self.device)

    def _epochs(self) -> float:
        """How often the training data were seen: by tokens, or by examples."""
        if self.config.objective.kind.task:
            return self.state.step * self.config.training.batch_size / len(self.dataset.train)
        return self.state.tokens / len(self.dataset.train)

    @torch.no_grad()
    def take_best(self) -> Evaluation | None:
        """Take the weights of the best checkpoint back and score them; None where they are those of now.

        Only the first rank does, for it alone writes the model.

        Raises:
            InputError: that checkpoint is damaged.
        """
        best = next(iter(best_first(checkpoints(self.folder / "checkpoints"))), None)
        if best is None or self.ranks.rank or read_state(best).step == self.state.step:
            return None
        check(best)
        if self.config.objective.lora_rank:
            load_adapter(self.model, best / ADAPTER)
        else:
            saved = dict(load_model(best).named_parameters())
            for name, parameter in self.model.named_parameters():
                parameter.copy_(saved[name])
        step = read_state(best).step
        self.display.say(f"model: step {step} of {self.state.step}, the best in validation")
        return self.objective.evaluate(self.model, self.config.training.rows, self.state.dtype, 0)

    def keep_folder(self) -> None:
        """Lock the folder and write config.toml again where somebody has deleted them.

        Without the one another run may begin there, without the other nothing takes this one up again.

        Raises:
            InputError: another process has begun to write there.
        """
        path = self.folder / CONFIG
        # Where nothing can be written, the checkpoint beside it says so.
        with contextlib.suppress(OSError):
            if self.ranks.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._keep_lock()
                if not path.exists():
                    write_text(path, self.config.to_toml())
                    self.display.warn(f"{path}: deleted during the run; written again")

    def finish(self, validation: Evaluation) -> None:
        """The model's folder, the picture, the samples, and the result in words."""
        state, say = self.state, self.display.say
        model: TrainedModel = self.ranks.whole(self.model, self._make)
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
        say(f"validation: {validation.describe()}")
        if validation.bits_per_byte is not None:
            primed = "not computed for so long a text" if xz is None else f"{xz:.4f} bits per byte"
            say(f"xz -9 primed with the training text: {primed}")
        say(f"in {self.folder}: model/, loss.png, samples.txt, metrics.jsonl, config.toml")
