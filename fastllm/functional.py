"""torch.nn.functional's names, on fused kernels. What is ours is keyword-only, after torch's own arguments."""

from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm

__all__ = ["layer_norm", "rms_norm"]
