"""Presets of a whole run: a model's shape with the objective and the training that suit it.

They were chosen by measurement; docs/tour-measured.md has their scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import InputError
from ..models.config import ModelConfig

# The settings that say when a run ends.
BUDGET = ("steps", "max_seconds", "epochs")


@dataclass(frozen=True)
class Recipe:
    """``objective`` and ``training``: the settings that differ from their defaults."""

    summary: str
    model: ModelConfig
    objective: Mapping[str, Any]
    training: Mapping[str, Any]

    def under(self, tables: Mapping[str, Any], where: str) -> dict[str, dict]:
        """The tables ``objective`` and ``training`` with this recipe's settings where ``tables`` have none.

        Raises:
            InputError: another objective is asked for.
        """
        own, asked = self.objective["objective"], tables.get("objective", {}).get("objective")
        if asked not in (None, own):
            raise InputError(f"{where}: preset: this one is for objective {own}, not for {asked}")
        given = tables.get("training", {})
        training = dict(self.training)
        if set(BUDGET) & set(given):
            training.pop("epochs", None)
        return {"objective": {**self.objective, **tables.get("objective", {})}, "training": {**training, **given}}


RECIPES = {
    "translate-small": Recipe(
        "pairs of sentences, some ten thousand of them",
        ModelConfig(
            encoder="transformer", decoder="transformer", vocab_size=6000, context_length=128, num_layers=3,
            num_heads=4, hidden_size=192, positions="rotary", norm="rms", embedding_norm=True, qk_norm=True,
            activation="relu2", bias=False, dropout=0.3, zero_init=True,
        ),
        {"objective": "seq2seq", "label_smoothing": 0.1},
        {
            "epochs": 16.0, "batch_size": 128, "lr": 3e-3, "muon_lr": 0.02, "weight_decay": 0.1, "ema_decay": 0.998,
            "eval_interval": 250, "eval_windows": 0, "patience": 6, "dtype": "auto",
        },
    ),
    "translate-rnn": Recipe(
        "pairs of sentences, some ten thousand of them, by an LSTM with attention",
        ModelConfig(
            encoder="lstm", decoder="lstm", vocab_size=6000, context_length=128, num_layers=2, num_heads=4,
            hidden_size=256, norm="rms", embedding_norm=True, bias=False, dropout=0.3, zero_init=True,
        ),
        {"objective": "seq2seq", "label_smoothing": 0.1},
        {
            "epochs": 14.0, "batch_size": 128, "lr": 3e-3, "muon_lr": 0.02, "weight_decay": 0.1, "ema_decay": 0.998,
            "eval_interval": 250, "eval_windows": 0, "patience": 6, "dtype": "auto",
        },
    ),
    "classify-tiny": Recipe(
        "labels of short texts, from a few thousand examples",
        ModelConfig(
            encoder="conv", decoder="none", heads=("classify",), pooling="max", vocab_size=16000, context_length=256,
            num_layers=1, hidden_size=432, dropout=0.4,
        ),
        {"objective": "classify", "tokenizer_kind": "word", "label_smoothing": 0.1, "token_dropout": 0.1},
        {
            "epochs": 5.0, "batch_size": 64, "lr": 1.5e-3, "muon_lr": 0.01, "weight_decay": 0.01,
            "eval_interval": 50, "eval_windows": 0, "dtype": "float32", "ema_decay": 0.98,
        },
    ),
    "classify-small": Recipe(
        "labels of short texts, from some ten thousand examples",
        ModelConfig(
            encoder="gru", decoder="none", heads=("classify",), pooling="max", vocab_size=16000, context_length=256,
            num_layers=1, hidden_size=256, dropout=0.5,
        ),
        {"objective": "classify", "tokenizer_kind": "word", "label_smoothing": 0.1, "token_dropout": 0.25},
        {
            "epochs": 2.0, "batch_size": 64, "lr": 1.5e-3, "muon_lr": 0.01, "weight_decay": 0.01,
            "eval_interval": 200, "eval_windows": 0, "dtype": "float32", "ema_decay": 0.998,
        },
    ),
}  # fmt: skip
