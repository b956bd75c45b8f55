"""A folder per family of ops. Importing their modules fills the registry."""

from . import gated, rotary_embedding  # noqa: F401
from .attention import attention, multihead, sdpa  # noqa: F401
from .cross_entropy import cross_entropy, linear  # noqa: F401
from .embedding import embedding, embedding_sum  # noqa: F401
from .norm import add_norm, layer_norm, rms_norm  # noqa: F401
