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
    # As in the package fastllm: what needs only the settings imports no torch.
    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import api

        return getattr(api, name)

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
