"""torch.nn's modules, each a subclass with the same arguments and state_dict keys, on fused kernels."""

from .ops.add_layer_norm import AddLayerNorm
from .ops.add_rms_norm import AddRMSNorm
from .ops.cross_entropy import CrossEntropyLoss
from .ops.embedding import Embedding
from .ops.embedding_sum import EmbeddingSum
from .ops.geglu import GEGLU
from .ops.layer_norm import LayerNorm
from .ops.linear_cross_entropy import LinearCrossEntropyHead, LinearCrossEntropyLoss
from .ops.multihead_attention import MultiheadAttention
from .ops.rms_norm import RMSNorm
from .ops.swiglu import SwiGLU

__all__ = [
    "GEGLU",
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "Embedding",
    "EmbeddingSum",
    "LayerNorm",
    "LinearCrossEntropyHead",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "SwiGLU",
]
