"""torch.nn's modules, each a subclass with the same arguments and state_dict keys, on fused kernels."""

from .ops.attention.multihead import MultiheadAttention
from .ops.cross_entropy.cross_entropy import CrossEntropyLoss
from .ops.cross_entropy.linear import LinearCrossEntropyHead, LinearCrossEntropyLoss
from .ops.embedding.embedding import Embedding
from .ops.embedding.embedding_sum import EmbeddingSum
from .ops.gated import GEGLU, SwiGLU
from .ops.linear import Linear
from .ops.norm.add_norm import AddLayerNorm, AddRMSNorm
from .ops.norm.layer_norm import LayerNorm
from .ops.norm.rms_norm import RMSNorm

__all__ = [
    "GEGLU",
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "Embedding",
    "EmbeddingSum",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyHead",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "SwiGLU",
]
