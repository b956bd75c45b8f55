"""Decoders, encoders and both together, of attention or recurrent; their configuration and presets."""

from .. import quiet_interrupt

__all__ = [
    "PRESETS",
    "RNN",
    "DecoderCache",
    "Encoded",
    "Encoder",
    "EncoderDecoder",
    "KVCache",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "RecurrentCache",
    "Transformer",
    "TransformerConfig",
    "build_model",
    "load_model",
    "model_class",
]

if quiet_interrupt.is_command():
    __getattr__ = quiet_interrupt.late_names(__name__, __all__)
else:
    from .api import (
        PRESETS,
        RNN,
        DecoderCache,
        Encoded,
        Encoder,
        EncoderDecoder,
        KVCache,
        LanguageModel,
        Model,
        ModelConfig,
        RecurrentCache,
        Transformer,
        TransformerConfig,
        build_model,
        load_model,
        model_class,
    )
