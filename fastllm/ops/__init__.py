"""One module per op: reference, registration, gradient, function, Module, record. Importing them fills the registry."""

from . import (  # noqa: F401
    add_layer_norm,
    add_rms_norm,
    attention,
    cross_entropy,
    embedding,
    embedding_sum,
    geglu,
    layer_norm,
    linear_cross_entropy,
    multihead_attention,
    rms_norm,
    rotary_embedding,
    scaled_dot_product_attention,
    swiglu,
)
