"""The shape of a model: one dataclass for decoders, encoders and both, of attention or recurrent, with presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..config import InputError, check_fields, option

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


def _size(default, help: str, minimum: int = 1, maximum: int = MAX_SIZE):
    """A whole number that is a size or a count."""
    return option(default, help, minimum=minimum, maximum=maximum)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its function.

    ``decoder`` alone is a language model. ``encoder`` alone reads text (BERT and similar models). Both together
    translate. Either may be a Transformer or recurrent, and the encoder may be convolutional. They share only
    hidden_size.

    Raises:
        InputError: a field is out of range or two fields do not fit; the message names them.
    """

    encoder: str = option("none", "the part that reads its whole input at once", choices=("none", *ENCODERS))
    decoder: str = option("transformer", "the part that predicts one token after another", choices=("none", *KINDS))
    heads: tuple[str, ...] = option((), "heads on an encoder", choices=HEADS)
    labels: tuple[str, ...] = option((), "names of the classes; training takes them from its data", metavar="LABEL")
    vocab_size: int = _size(50257, "tokens in the vocabulary")
    context_length: int = _size(1024, "longest sequence, in tokens")
    num_layers: int = _size(12, "blocks of attention and MLP, or recurrent ones", maximum=MAX_LAYERS)
    num_encoder_layers: int | None = _size(
        None, "blocks of the encoder; as num_layers if not given", maximum=MAX_LAYERS
    )
    num_heads: int = _size(12, "query heads")
    num_kv_heads: int | None = _size(None, "key and value heads (grouped-query attention); as num_heads if not given")
    hidden_size: int = _size(768, "width of the residual stream")
    head_size: int | None = _size(None, "width of a head; hidden_size / num_heads if not given")
    intermediate_size: int | None = _size(
        None, "width of the MLP; if not given 4 x hidden_size, for gated ones 8/3 of it rounded up to a multiple of 64"
    )
    positions: str = option("learned", "how positions enter a Transformer", choices=POSITIONS)
    rotary_base: float = option(10000.0, "base of the rotary frequencies (Su et al. 2021)", above=0)
    relative_buckets: int = _size(32, "buckets of distance (relative positions, Raffel et al. 2020)")
    relative_distance: int = _size(128, "all distances from here on share one bucket")
    segments: int = _size(0, "rows of the segment embedding; 0: none", minimum=0)
    scale_embeddings: bool = option(False, "multiply token embeddings with sqrt(hidden_size) (Vaswani et al. 2017)")
    norm: str = option("layer", "normalisation", choices=NORMS)
    norm_position: str = option("pre", "before each branch, or after its sum with the residual", choices=NORM_POSITIONS)
    norm_eps: float = option(1e-5, "added to the variance or the mean square", above=0)
    embedding_norm: bool = option(False, "normalise the embeddings before the first block")
    qk_norm: bool = option(False, "RMS-normalise queries and keys per head before the product")
    scale_attention: bool = option(True, "divide attention's products by sqrt(head size); T5 does not")
    activation: str = option("gelu_tanh", "the MLP's non-linearity; relu2 is ReLU squared", choices=ACTIVATIONS)
    bias: bool = option(True, "biases in the linear layers and in LayerNorm")
    tie_embeddings: bool = option(True, "the head shares the token embedding's weight")
    logit_scale: float = option(1.0, "multiplies the logits; hidden_size^-0.5 in the first T5")
    dropout: float = option(
        0.0, "dropout probability on embeddings and on each branch, in training", minimum=0, below=1
    )
    zero_init: bool = option(False, "start the projections back into the residual stream at zero, not at GPT-2's scale")
    pooling: str = option(
        "first", "what the heads nsp and classify read: a text's first token through a tanh layer, like BERT's, or "
        "the mean or the maximum of all its states", choices=POOLINGS,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        for name in ("heads", "labels"):
            names = getattr(self, name)
            self._require(name, len(set(names)) == len(names), "no repetitions")
        self._require("decoder", self.encoder != "none" or self.decoder != "none", "one where there is no encoder")
        self._require("heads", not self.heads or self.decoder == "none", "none for a model with a decoder")
        self._require("relative_buckets", self.relative_buckets % 4 == 0, "a multiple of 4")
        # Half of the buckets, per direction, hold single distances.
        self._require("relative_distance", self.relative_distance > self.relative_buckets // 2,
                      f"more than half of relative_buckets {self.relative_buckets}")  # fmt: skip
        if self.attends:
            fits = self.head_size is not None or self.hidden_size % self.num_heads == 0
            self._require("num_heads", fits, f"a divisor of hidden_size {self.hidden_size}")
            fits = self.num_heads % self.kv_heads == 0
            self._require("num_kv_heads", fits, f"a divisor of num_heads {self.num_heads}")
        if self.positions == "rotary" and self.has_transformer:
            self._require("num_heads", self.head_dim % 2 == 0, "an even hidden_size / num_heads, for rotary positions")
        if self.encoder in ("lstm", "gru") or (self.positions == "sinusoidal" and self.has_transformer):
            self._require("hidden_size", self.hidden_size % 2 == 0, "an even number, for two directions and sinusoids")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

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
            InputError: a name is unknown, or a value is out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"unknown field of {cls.__name__}: {', '.join(sorted(unknown))}")
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
