"""The shape of a Transformer: one dataclass that covers GPT-2's shape and Llama's, with presets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

POSITIONS = ("learned", "rotary")
NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")


def _field(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides a decoder's parameters and its function.

    Raises:
        ValueError: a field is out of range or two fields do not fit; the message names them.
    """

    vocab_size: int = _field(50257, "tokens in the vocabulary")
    context_length: int = _field(1024, "longest sequence, in tokens")
    num_layers: int = _field(12, "blocks of attention and MLP")
    num_heads: int = _field(12, "query heads")
    num_kv_heads: int | None = _field(None, "key and value heads (grouped-query attention); as num_heads if not given")
    hidden_size: int = _field(768, "width of the residual stream")
    intermediate_size: int | None = _field(
        None, "width of the MLP; if not given 4 x hidden_size, for swiglu 8/3 of it rounded up to a multiple of 64"
    )
    positions: str = _field("learned", "how positions enter", choices=POSITIONS)
    rotary_base: float = _field(10000.0, "base of the rotary frequencies (Su et al. 2021)")
    norm: str = _field("layer", "normalisation", choices=NORMS)
    norm_eps: float = _field(1e-5, "added to the variance or the mean square")
    embedding_norm: bool = _field(False, "normalise the embeddings before the first block")
    qk_norm: bool = _field(False, "RMS-normalise queries and keys per head before the product")
    activation: str = _field("gelu_tanh", "the MLP's non-linearity; relu2 is ReLU squared", choices=ACTIVATIONS)
    bias: bool = _field(True, "biases in the linear layers and in LayerNorm")
    tie_embeddings: bool = _field(True, "the head shares the token embedding's weight")
    dropout: float = _field(0.0, "dropout probability on embeddings and on each branch, in training")
    zero_init: bool = _field(False, "start the projections back into the residual stream at zero, not at GPT-2's scale")

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "hidden_size"):
            self._require(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "at least 1")
        for name in ("num_kv_heads", "intermediate_size"):
            value = getattr(self, name)
            self._require(name, value is None or (isinstance(value, int) and value >= 1), "at least 1")
        for name, choices in (("positions", POSITIONS), ("norm", NORMS), ("activation", ACTIVATIONS)):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._require("norm_eps", self.norm_eps > 0, "positive")
        self._require("rotary_base", self.rotary_base > 0, "positive")
        self._require(
            "num_heads", self.hidden_size % self.num_heads == 0, f"a divisor of hidden_size {self.hidden_size}"
        )
        self._require("num_kv_heads", self.num_heads % self.kv_heads == 0, f"a divisor of num_heads {self.num_heads}")
        if self.positions == "rotary":
            self._require("num_heads", self.head_dim % 2 == 0, "such that hidden_size / num_heads is even, for rotary")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size:
            return self.intermediate_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    def replace(self, **changes) -> TransformerConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict) -> TransformerConfig:
        """From field names and values; an unknown name is a ValueError."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown field of TransformerConfig: {', '.join(sorted(unknown))}")
        return cls(**values)


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
        vocab_size=1024, context_length=256, num_layers=2, num_heads=4, hidden_size=256, positions="rotary",
        norm="rms", embedding_norm=True, qk_norm=True, activation="relu2", bias=False, dropout=0.1, zero_init=True,
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
