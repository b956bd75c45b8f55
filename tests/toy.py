"""The smallest model that has all the parts, and what tests of its runs share."""

from pathlib import Path

from fastllm.models import TransformerConfig

TOY = TransformerConfig(
    vocab_size=300, context_length=32, num_layers=2, num_heads=2, hidden_size=32, positions="rotary", norm="rms",
    activation="relu2", bias=False, dropout=0.1, qk_norm=True,
)  # fmt: skip


def weights(run: Path) -> bytes:
    """The finished model's weights, as stored."""
    return (run / "model" / "model.safetensors").read_bytes()
