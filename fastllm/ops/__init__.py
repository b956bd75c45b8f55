"""One module per op: reference, registration, gradient, function, Module, record. Importing them fills the registry."""

from . import cross_entropy, embedding, embedding_sum, layer_norm, rms_norm  # noqa: F401
