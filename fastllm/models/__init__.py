"""The Transformer, its configuration and presets."""

from .cache import KVCache
from .config import PRESETS, TransformerConfig
from .transformer import Transformer

__all__ = ["PRESETS", "KVCache", "Transformer", "TransformerConfig"]
