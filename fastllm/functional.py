"""torch.nn.functional's names, on fused kernels. What is ours is keyword-only, after torch's own arguments."""

from .ops.add_layer_norm import add_layer_norm
from .ops.add_rms_norm import add_rms_norm
from .ops.attention import attention
from .ops.cross_entropy import cross_entropy
from .ops.embedding import embedding
from .ops.embedding_sum import embedding_sum
from .ops.geglu import geglu
from .ops.layer_norm import layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_plan
from .ops.rms_norm import rms_norm
from .ops.rotary_embedding import rotary_embedding
from .ops.scaled_dot_product_attention import scaled_dot_product_attention
from .ops.swiglu import swiglu

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "embedding_sum",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_plan",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "swiglu",
]
