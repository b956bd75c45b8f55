"""The shape of a model: one dataclass for decoders, encoders and both, of attention or recurrent, with presets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..config import MAX_FLOAT

POSITIONS = ("learned", "rotary", "sinusoidal", "relative")
NORMS = ("layer", "rms")
NORM_POSITIONS = ("pre", "post")
GATED = ("swiglu", "geglu", "geglu_tanh")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", *GATED)
# No machine of today holds a larger model, and even building it would fill the memory.
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000
KINDS = ("transformer", "lstm", "gru")
# An encoder may also be convolutional.
ENCODERS = (*KINDS, "conv")
POOLINGS = ("first", "mean", "max")
# Settings of one kind of positions.
_POSITIONS_OF = {"rotary_base": "rotary", "relative_buckets": "relative", "relative_distance": "relative"}
# What a head on an encoder gives: tokens, whether two texts follow each other, a class, an answer's ends.
HEADS = ("mlm", "nsp", "classify", "span")


def _field(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its function.

    ``decoder`` alone is a language model. ``encoder`` alone reads text (BERT and similar models). Both together
    translate. Either may be a Transformer or recurrent, and the encoder may be convolutional. They share only
    hidden_size.

    Raises:
        ValueError: a field is out of range or two fields do not fit; the message names them.
    """

    encoder: str = _field("none", "the part that reads its whole input at once", choices=("none", *ENCODERS))
    decoder: str = _field("transformer", "the part that predicts one token after another", choices=("none", *KINDS))
    heads: tuple[str, ...] = _field((), "heads on an encoder", choices=HEADS)
    labels: tuple[str, ...] = _field((), "names of the classes; training takes them from its data", metavar="LABEL")
    vocab_size: int = _field(50257, "tokens in the vocabulary")
    context_length: int = _field(1024, "longest sequence, in tokens")
    num_layers: int = _field(12, "blocks of attention and MLP, or recurrent ones")
    num_encoder_layers: int | None = _field(None, "blocks of the encoder; as num_layers if not given")
    num_heads: int = _field(12, "query heads")
    num_kv_heads: int | None = _field(None, "key and value heads (grouped-query attention); as num_heads if not given")
    hidden_size: int = _field(768, "width of the residual stream")
    head_size: int | None = _field(None, "width of a head; hidden_size / num_heads if not given")
    intermediate_size: int | None = _field(
        None, "width of the MLP; if not given 4 x hidden_size, for gated ones 8/3 of it rounded up to a multiple of 64"
    )
    positions: str = _field("learned", "how positions enter a Transformer", choices=POSITIONS)
    rotary_base: float = _field(10000.0, "base of the rotary frequencies (Su et al. 2021)")
    relative_buckets: int = _field(32, "buckets of distance (relative positions, Raffel et al. 2020)")
    relative_distance: int = _field(128, "all distances from here on share one bucket")
    segments: int = _field(0, "rows of the segment embedding; 0: none")
    scale_embeddings: bool = _field(False, "multiply token embeddings with sqrt(hidden_size) (Vaswani et al. 2017)")
    norm: str = _field("layer", "normalisation", choices=NORMS)
    norm_position: str = _field("pre", "before each branch, or after its sum with the residual", choices=NORM_POSITIONS)
    norm_eps: float = _field(1e-5, "added to the variance or the mean square")
    embedding_norm: bool = _field(False, "normalise the embeddings before the first block")
    qk_norm: bool = _field(False, "RMS-normalise queries and keys per head before the product")
    scale_attention: bool = _field(True, "divide attention's products by sqrt(head size); T5 does not")
    activation: str = _field("gelu_tanh", "the MLP's non-linearity; relu2 is ReLU squared", choices=ACTIVATIONS)
    bias: bool = _field(True, "biases in the linear layers and in LayerNorm")
    tie_embeddings: bool = _field(True, "the head shares the token embedding's weight")
    logit_scale: float = _field(1.0, "multiplies the logits; hidden_size^-0.5 in the first T5")
    dropout: float = _field(0.0, "dropout probability on embeddings and on each branch, in training")
    zero_init: bool = _field(False, "start the projections back into the residual stream at zero, not at GPT-2's scale")
    pooling: str = _field(
        "first", "what the heads nsp and classify read: a text's first token through a tanh layer, like BERT's, or "
        "the mean or the maximum of all its states", choices=POOLINGS,
    )  # fmt: skip

    def __post_init__(self):
        for name in ("heads", "labels"):
            names: Any = getattr(self, name)
            listed = isinstance(names, Iterable) and not isinstance(names, str)
            names = tuple(names) if listed else names
            object.__setattr__(self, name, names)
            self._require(name, listed and all(isinstance(n, str) for n in names), "a list of texts")
            self._require(name, len(set(names)) == len(names), "without repetitions")
        for f in fields(self):
            value = getattr(self, f.name)
            if type(f.default) is bool:
                self._require(f.name, isinstance(value, bool), "True or False")
            elif type(f.default) is float:
                finite = isinstance(value, int | float) and abs(value) <= MAX_FLOAT
                self._require(f.name, finite, "a finite number")
        optional = ("num_kv_heads", "intermediate_size", "num_encoder_layers", "head_size")
        for name in (
            "vocab_size", "context_length", "num_layers", "num_heads", "hidden_size", "segments", "relative_buckets",
            "relative_distance", *optional,
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            least, most = int(name != "segments"), MAX_LAYERS if name.endswith("layers") else MAX_SIZE
            number = value if isinstance(value, int) and not isinstance(value, bool) else -1
            self._require(name, number >= least, f"at least {least}")
            self._require(name, number <= most, f"at most {most}")
        for name, choices in (
            ("positions", POSITIONS), ("norm", NORMS), ("norm_position", NORM_POSITIONS), ("activation", ACTIVATIONS),
            ("pooling", POOLINGS),
            ("encoder", ("none", *ENCODERS)), ("decoder", ("none", *KINDS)),
        ):  # fmt: skip
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._require("decoder", self.encoder != "none" or self.decoder != "none", "given where there is no encoder")
        self._require("heads", set(self.heads) <= set(HEADS), f"among {', '.join(HEADS)}")
        self._require("heads", not self.heads or self.decoder == "none", "empty for a model with a decoder")
        self._require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._require("norm_eps", self.norm_eps > 0, "positive")
        self._require("rotary_base", self.rotary_base > 0, "positive")
        self._require("relative_buckets", self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
                      "a positive multiple of 4")  # fmt: skip
        # Half of the buckets, per direction, hold single distances.
        self._require("relative_distance", self.relative_distance > self.relative_buckets // 2,
                      f"more than half of relative_buckets {self.relative_buckets}")  # fmt: skip
        if self.attends and self.head_size is None:
            self._require(
                "num_heads", self.hidden_size % self.num_heads == 0, f"a divisor of hidden_size {self.hidden_size}"
            )
        if self.attends:
            self._require(
                "num_kv_heads", self.num_heads % self.kv_heads == 0, f"a divisor of num_heads {self.num_heads}"
            )
        if self.positions == "rotary" and self.has_transformer:
            self._require("num_heads", self.head_dim % 2 == 0, "such that hidden_size / num_heads is even, for rotary")
        if self.encoder in ("lstm", "gru") or (self.positions == "sinusoidal" and self.has_transformer):
            self._require("hidden_size", self.hidden_size % 2 == 0, "even, for two directions and for sinusoids")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def has_transformer(self) -> bool:
        """Whether a part of the model is a Transformer."""
        return "transformer" in (self.encoder, self.decoder)

    @property
    def attends(self) -> bool:
        """Whether a part of the model has attention; a decoder of any kind attends to its encoder."""
        return self.has_transformer or "none" not in (self.encoder, self.decoder)

    def unused(self) -> dict[str, str]:
        """The fields that a model of this shape does not read, and why."""
        found = {}
        if not self.attends:
            names = ("num_heads", "num_kv_heads", "head_size", "scale_attention")
            found |= dict.fromkeys(names, "the model has no attention")
        if not self.has_transformer:
            names = ("intermediate_size", "positions", "qk_norm", "activation", *_POSITIONS_OF)
            found |= dict.fromkeys(names, "no part of the model is a Transformer")
        else:
            for name, kind in _POSITIONS_OF.items():
                if kind != self.positions:
                    found[name] = f"positions are {self.positions}, not {kind}"
        if self.encoder == "none":
            found["num_encoder_layers"] = "the model has no encoder"
        elif self.decoder == "none" and self.num_encoder_layers is not None:
            found["num_layers"] = "the model has no decoder, and num_encoder_layers says how many its encoder has"
        if not {"nsp", "classify"} & set(self.heads):
            found["pooling"] = "no head of the model reads a whole text"
        if self.decoder == "none" and "mlm" not in self.heads:
            found |= dict.fromkeys(("tie_embeddings", "logit_scale"), "the model predicts no tokens")
        return found

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def num_classes(self) -> int:
        """The number of classes of the classification head: the number of labels, or 2 without labels."""
        return len(self.labels) or 2

    @property
    def encoder_layers(self) -> int:
        return self.num_encoder_layers or self.num_layers

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size:
            return self.intermediate_size
        if self.activation in GATED:
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    def replace(self, **changes) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """A configuration from field names and values.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown field of {cls.__name__}: {', '.join(sorted(unknown))}")
        return cls(**values)


# The name under which a Transformer's shape is written.
TransformerConfig = ModelConfig


def _gpt2(num_layers: int, num_heads: int, hidden_size: int) -> TransformerConfig:
    return TransformerConfig(num_layers=num_layers, num_heads=num_heads, hidden_size=hidden_size)


def _llama3(num_layers: int, num_heads: int, hidden_size: int, intermediate_size: int, tied: bool) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=128256, context_length=8192, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8,
        hidden_size=hidden_size, intermediate_size=intermediate_size, positions="rotary", rotary_base=500000.0,
        norm="rms", activation="swiglu", bias=False, tie_embeddings=tied,
    )  # fmt: skip


# Sizes of the published models: GPT-2 (Radford et al. 2019), Llama 3 (Dubey et al. 2024), nanoGPT's 10.65M model.
PRESETS = {
    "tiny": TransformerConfig(
        vocab_size=1024, context_length=256, num_layers=3, num_heads=4, hidden_size=192, positions="rotary",
        norm="rms", embedding_norm=True, qk_norm=True, activation="relu2", bias=False, dropout=0.2, zero_init=True,
    ),
    "small": TransformerConfig(
        vocab_size=96, context_length=256, num_layers=6, num_heads=6, hidden_size=384, activation="gelu", bias=False,
    ),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "llama-1b": _llama3(16, 32, 2048, 8192, tied=True),
    "llama-8b": _llama3(32, 32, 4096, 14336, tied=False),
}  # fmt: skip
