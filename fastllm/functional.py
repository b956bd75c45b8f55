"""torch.nn.functional's names, on fused kernels. What is ours is keyword-only, after torch's own arguments."""

from .ops.attention.attention import attention
from .ops.attention.sdpa import scaled_dot_product_attention
from .ops.cross_entropy.cross_entropy import cross_entropy
from .ops.cross_entropy.kl import linear_kl_div
from .ops.cross_entropy.linear import linear_cross_entropy, linear_cross_entropy_plan
from .ops.cross_entropy.log_probs import linear_log_probs
from .ops.embedding.embedding import embedding
from .ops.embedding.embedding_sum import embedding_sum
from .ops.gated import geglu, swiglu
from .ops.linear import linear
from .ops.norm.add_norm import add_layer_norm, add_rms_norm
from .ops.norm.layer_norm import layer_norm
from .ops.norm.rms_norm import rms_norm
from .ops.rotary_embedding import rotary_embedding

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "embedding_sum",
    "geglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_plan",
    "linear_kl_div",
    "linear_log_probs",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "swiglu",
]
