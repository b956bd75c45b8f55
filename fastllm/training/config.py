"""How to train, and everything a run is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import (
    InputError,
    build_settings,
    check_fields,
    check_kind,
    defaults_for,
    option,
    read_toml,
    settings,
    to_toml,
    unknown,
)
from ..data import DataConfig
from ..models.config import PRESETS, ModelConfig
from .objective_config import ObjectiveConfig, fit_model
from .recipes import BUDGET, RECIPES

DEFAULT_PRESET = "tiny"
# Without any budget: seconds of training, and passes over the text of a new causal model, whichever are over first.
# More passes learn the text by heart: docs/recipe.md has the scores after 9 to 30.
DEFAULT_SECONDS = 105.0
DEFAULT_EPOCHS = 11.0
# Decay of the hidden matrices: usual for Muon, and what a new causal model without any budget takes under Muon. On five
# texts and seeds 0.3 scored 0.0030 to 0.0144 bits per byte better there (docs/recipe.md). Elsewhere it is not measured.
WEIGHT_DECAY = 0.1
DEFAULT_RUN_WEIGHT_DECAY = 0.3
# Apple's and Intel's GPUs run PyTorch's own operators; nobody has tried them.
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class TrainingConfig:
    """Budget, optimiser, schedule, precision, and intervals of evaluation and saving.

    Fields marked ``resume`` do not change the arithmetic of a step, so they may change when a run is resumed. A new
    budget does move the schedule.
    """

    steps: int | None = option(None, "stop after this many optimiser steps", minimum=1, resume=True)
    max_seconds: float | None = option(
        None,
        "stop after this many seconds of training; the schedule follows the clock, so that it ends in time; "
        f"{DEFAULT_SECONDS:g} without --steps and --epochs",
        above=0,
        resume=True,
    )
    batch_size: int = option(8, "sequences per optimiser step", minimum=1)
    micro_batch_size: int | None = option(
        None,
        "sequences per forward pass and process, a divisor of batch_size (gradient accumulation); all if not given",
        minimum=1, resume=True,
    )  # fmt: skip
    optimizer: str = option(
        "muon", "for the hidden matrices; all other parameters take AdamW", choices=("muon", "adamw")
    )
    muon_lr: float = option(0.02, "peak learning rate of Muon", above=0)
    lr: float = option(3e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float | None = option(
        None,
        f"decay of the hidden matrices; if not given {WEIGHT_DECAY:g}, and {DEFAULT_RUN_WEIGHT_DECAY:g} under Muon for "
        "a new causal model without any budget",
        minimum=0,
    )
    embedding_weight_decay: float = option(0.0, "decay of embeddings and head", minimum=0)
    momentum: float = option(0.95, "Muon's momentum", minimum=0, below=1)
    beta1: float = option(0.9, "AdamW's first beta", minimum=0, below=1)
    beta2: float = option(0.95, "AdamW's second beta", minimum=0, below=1)
    clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping", minimum=0)
    schedule: str = option(
        "linear", "after the warm-up: linear or cosine decay, or wsd (constant, then linear decay)",
        choices=("linear", "cosine", "wsd"),
    )  # fmt: skip
    warmup: float = option(0.02, "part of the run over which the rate rises", minimum=0, below=1)
    decay: float = option(0.3, "part of the run over which wsd decays", above=0, maximum=1)
    min_lr: float = option(0.0, "final learning rate, as a part of the peak", minimum=0, maximum=1)
    seed: int = option(0, "of weights, batches, dropout and samples", minimum=0)
    device: str = option("auto", "where to train; auto takes CUDA if it is there", choices=DEVICES)
    dtype: str = option(
        "auto",
        "bfloat16 means autocast over float32 weights, float16 the same with a scaled loss; auto times float32 and "
        "the 16-bit dtypes that the device has",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    compile: bool = option(False, "compile the loss with torch.compile")
    checkpoint_activations: bool = option(False, "keep only each block's input for the backward pass")
    eval_interval: int = option(50, "steps between evaluations; 0: only at the end", minimum=0, resume=True)
    eval_windows: int = option(
        128,
        "windows that an evaluation during the run scores at most, each with half a context of new tokens; 0: the "
        "whole split, which the last evaluation always scores",
        minimum=0, resume=True,
    )  # fmt: skip
    checkpoint_interval: int = option(500, "steps between checkpoints; 0: only at the end", minimum=0, resume=True)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", minimum=1, resume=True)
    keep_best: int = option(
        0, "how many checkpoints to keep also for their score; a step needs both an evaluation and a checkpoint",
        minimum=0, resume=True,
    )  # fmt: skip
    background_saving: bool = option(True, "write checkpoints while training goes on", resume=True)
    outlier: float | None = option(
        None,
        "skip a step whose loss or gradient norm lies this many standard deviations above the mean of the last 128; "
        "without it, only steps that are not finite are skipped",
        above=0, resume=True,
    )  # fmt: skip
    wandb: str | None = option(None, "a Weights & Biases project to log to as well", metavar="PROJECT", resume=True)
    parallel: str = option(
        "ddp", "how the processes that torchrun starts train together: the whole model on each, or fully sharded",
        choices=("ddp", "fsdp"), resume=True,
    )  # fmt: skip
    tensor_parallel: int = option(
        1, "processes over which the vocabulary of embedding and head is split", minimum=1, resume=True
    )
    hang_timeout: float = option(
        600.0,
        "seconds in a step after which the processes print which one they wait for, and end",
        above=0,
        resume=True,
    )
    max_skipped: int = option(3, "stop after this many skipped steps in a row", minimum=1, resume=True)
    epochs: float | None = option(
        None,
        f"stop after this many passes over the training data; --steps overrides it; {DEFAULT_EPOCHS:g} for a new "
        "causal model without any budget",
        above=0,
    )
    ema_decay: float = option(
        0.0, "decay of the exponential moving average of the weights, which is then scored and saved; 0: none",
        minimum=0, below=1,
    )  # fmt: skip
    patience: int = option(
        0, "stop after this many evaluations in a row without a better score, and keep the weights of the best one; "
        "0: neither", minimum=0, resume=True,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        if self.batch_size % self.rows:
            raise InputError(f"micro_batch_size: {self.rows} does not divide batch_size {self.batch_size}")
        if self.patience and (self.parallel != "ddp" or self.tensor_parallel > 1):
            raise InputError("patience: the best weights are taken back by one process or ddp, not by sharded ranks")
        if self.patience and not (self.eval_interval and self.eval_windows == 0):
            raise InputError("patience: needs evaluations during the run (eval_interval) of the whole split "
                             "(eval_windows 0)")  # fmt: skip
        if self.warmup + (self.decay if self.schedule == "wsd" else 0) > 1:
            raise InputError(f"decay: {self.decay} and warmup {self.warmup} are together more than the run")
        if self.keep_best and not (self.eval_interval and self.checkpoint_interval):
            raise InputError("keep_best: needs evaluations (eval_interval) and checkpoints (checkpoint_interval) "
                             "during the run")  # fmt: skip

    def unused(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and why."""
        found = {}
        if self.optimizer != "muon":
            found |= dict.fromkeys(("muon_lr", "momentum"), f"the optimizer is {self.optimizer}, not muon")
        if self.schedule != "wsd":
            found["decay"] = f"the schedule is {self.schedule}, not wsd"
        if not self.eval_interval:
            found["eval_windows"] = "there is no evaluation during the run (eval_interval)"
        return found

    @property
    def rows(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def hidden_decay(self) -> float:
        """Decay of the hidden matrices."""
        return WEIGHT_DECAY if self.weight_decay is None else self.weight_decay

    def with_budget(self) -> TrainingConfig:
        """This configuration, with the default time budget if no budget is set."""
        if all(getattr(self, name) is None for name in BUDGET):
            return replace(self, max_seconds=DEFAULT_SECONDS)
        return self


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. ``config.toml`` has one table for each field.

    Raises:
        TypeError: a field is of another class.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = PRESETS[DEFAULT_PRESET]
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self):
        for name, kind in (
            ("data", DataConfig), ("model", ModelConfig), ("training", TrainingConfig), ("objective", ObjectiveConfig)
        ):  # fmt: skip
            check_kind(name, getattr(self, name), kind, f"{'an' if name == 'objective' else 'a'} {kind.__name__}")

    def with_budget(self) -> RunConfig:
        """This configuration, with the default budget if none is set: a time, and passes for a new causal model.

        Such a model then has the weight decay that was measured with these passes, if none is set.
        """
        training = self.training.with_budget()
        if training is not self.training and self.objective.objective == "causal" and not self.objective.pretrained:
            training = replace(training, epochs=DEFAULT_EPOCHS)
            if training.weight_decay is None and training.optimizer == "muon":
                training = replace(training, weight_decay=DEFAULT_RUN_WEIGHT_DECAY)
        return replace(self, training=training)

    def unused(self) -> dict[str, dict[str, str]]:
        """The settings that have no effect beside the others, by table, and why."""
        objective = self.objective.unused()
        if self.data.tokenizer or self.objective.pretrained:
            objective.setdefault("tokenizer_kind", "the tokenizer is given")
        data = {"deduplicate": "examples have no paragraphs to compare"} if self.objective.kind.task else {}
        return {
            "data": data, "model": self.model.unused(), "training": self.training.unused(), "objective": objective,
        }  # fmt: skip

    def without_unused(self) -> RunConfig:
        """This configuration, with the defaults of their classes in settings that have no effect."""
        return replace(
            self, **{table: defaults_for(getattr(self, table), names) for table, names in self.unused().items()}
        )

    def to_toml(self) -> str:
        """The settings that have an effect, as TOML."""
        return to_toml({field.name: getattr(self, field.name) for field in fields(self)}, self.unused())


def build_run_config(tables: Mapping[str, Any], where: str, preset: str | None = None) -> RunConfig:
    """A run's settings from the tables ``data``, ``model`` (which may have a ``preset``), ``training``, ``objective``.

    The model gets the parts and heads that the objective needs. Settings without an effect get their defaults;
    :func:`fastllm.config.tell_unused` names them.

    A preset that is a recipe has settings for all tables. Values in ``tables`` override it.

    Args:
        where: what messages start with.
        preset: overrides the table's own.

    Raises:
        InputError: an unknown table, key or preset, or a value out of its range.
    """
    kinds = {"data": DataConfig, "model": ModelConfig, "training": TrainingConfig, "objective": ObjectiveConfig}
    for title, table in tables.items():
        if title not in kinds or (title == "objective" and isinstance(table, str)):
            homes = [name for name, kind in kinds.items() if title in {s.name for s in settings(kind)}]
            if homes:
                raise InputError(f"{where}: {title!r} belongs into the table [{homes[0]}]")
            raise unknown(title, kinds, where)
        if not isinstance(table, Mapping):
            raise InputError(f"{where}: {title}: expected a table, got {table!r}")
    model = dict(tables.get("model", {}))
    name = preset or model.get("preset", DEFAULT_PRESET)
    model.pop("preset", None)
    if name not in (*PRESETS, *RECIPES):
        raise InputError(f"{where}: preset: expected one of {', '.join((*PRESETS, *RECIPES))}; got {name!r}")
    recipe = RECIPES.get(name)
    if recipe is not None:
        tables = {**tables, **recipe.under(tables, where)}
    objective = build_settings(ObjectiveConfig, tables.get("objective", {}), where)
    # Only beside the parts that the objective needs can they be right.
    heads = model.pop("heads", None)
    shape = build_settings(ModelConfig, model, where, PRESETS[name] if recipe is None else recipe.model)
    if objective.pretrained is None:
        try:
            shape = fit_model(objective, shape, model)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    if heads is not None:
        encoder = {"encoder": "transformer", "decoder": "none"}
        asked = build_settings(ModelConfig, {**encoder, "heads": heads}, where).heads
        if objective.pretrained is None and set(asked) != set(shape.heads):
            wanted, got = (", ".join(names) or "none" for names in (shape.heads, asked))
            raise InputError(f"{where}: heads: objective {objective.objective} needs {wanted}, got {got}")
        shape = shape.replace(heads=asked)
    return RunConfig(
        data=build_settings(DataConfig, tables.get("data", {}), where),
        model=shape,
        training=build_settings(TrainingConfig, tables.get("training", {}), where),
        objective=objective,
    ).without_unused()


# Settings of several objectives, which only 0.2.0 wrote together: into the file of every run.
_OF_EVERY_RUN = {"mask_probability", "whole_word", "label_smoothing", "lora_rank"}


def read_tables(path: str | Path) -> dict[str, Any]:
    """The tables of a file of settings, such as a run's own ``config.toml``.

    0.2.0 wrote all settings of all objectives into every run's file. Its label smoothing was seq2seq's alone, and no
    objective had short windows: such a file is read as it was meant.

    Raises:
        InputError: the file is missing or not TOML.
    """
    tables = read_toml(path)
    objective = tables.get("objective")
    if not isinstance(objective, dict) or not set(objective) >= _OF_EVERY_RUN:
        return tables
    kind = objective.get("objective", "causal")
    if kind != "seq2seq":
        del objective["label_smoothing"]
    if kind == "causal":
        objective.setdefault("short_windows", 0.0)
    return tables


def read_run_config(path: str | Path) -> RunConfig:
    """A run's settings from a TOML file, such as a run's own ``config.toml``.

    Raises:
        InputError: see :func:`build_run_config`; or the file is missing or not TOML.
    """
    return build_run_config(read_tables(path), str(path))
