"""Language models: a decoder and a head over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cache import DecoderCache
from .config import ModelConfig
from .head import Head
from .next_token import last_logits
from .pretrained import Pretrained, concrete
from .rnn import RecurrentDecoder
from .stack import TransformerDecoder


class LanguageModel(Pretrained):
    """Logits, loss and size of a decoder alone. :class:`Transformer` and :class:`RNN` share it."""

    # The decoder's.
    token_embedding: torch.nn.Embedding
    decode: Callable[..., torch.Tensor]
    initialize: Callable[[], None]
    new_cache: Callable[..., DecoderCache]

    def __init__(self, config: ModelConfig):
        self._check_fits(config)
        super().__init__(config, cross=False)  # the decoder's own, which comes after this class
        self.head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.initialize()

    def hidden(
        self, tokens: torch.Tensor, cache: DecoderCache | None = None, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The normed last hidden states (B, T, hidden_size); arguments as :meth:`forward`'s."""
        return self.decode(tokens, cache=cache, prefix=prefix)

    def forward(
        self, tokens: torch.Tensor, cache: DecoderCache | None = None, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, T, vocab_size) of the token after each of ``tokens``.

        Args:
            tokens: (B, T), int64 or int32.
            cache: from :meth:`new_cache`. ``tokens`` follow the tokens that it holds, and are added to it.
            prefix: (B,), the length of each row's prefix, which all its tokens see (prefix LM).

        Raises:
            ValueError: tokens have the wrong shape or dtype, or reach past context_length.
            IndexError: a token is not in the vocabulary (on CPU).
        """
        logits = self.head(self.hidden(tokens, cache, prefix))
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def last_logits(self, tokens: torch.Tensor, cache: DecoderCache | None = None) -> torch.Tensor:
        """Logits (B, vocab_size) of the token after the last of ``tokens`` (B, T); arguments as :meth:`forward`'s.

        Raises:
            ValueError, IndexError: as :meth:`forward`.
        """
        return last_logits(self, self.hidden(tokens, cache)[:, -1])

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross-entropy in nats (fp32 scalar) of ``targets`` (B, T) given ``tokens``; -100 is ignored."""
        return self.head.loss(self.hidden(tokens, prefix=prefix), targets, self.config.logit_scale)

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs per token: 6 N + 12 layers x hidden x context (PaLM's, and nanoGPT's, formula).

        N counts the weights that take part in products: those of the head, but not those of the embedding tables.
        Attention is counted as if it were not causal, as others do with this formula. A recurrent model has none.
        """
        return flops_per_token(self, context_length or self.config.context_length)


def flops_per_token(model: Pretrained, length: int) -> int:
    """6 N + 12 layers x heads' width x ``length`` (PaLM's and nanoGPT's formula), N the weights that are multiplied."""
    config = model.config
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    looked_up = sum(weight.numel() for key, weight in tables.items() if key not in heads)
    layers = (config.num_layers if config.decoder == "transformer" else 0) + (
        config.encoder_layers if config.encoder == "transformer" else 0
    )
    attention = 12 * layers * config.num_heads * config.head_dim * length
    return 6 * (sum(p.numel() for p in model.parameters()) - looked_up) + attention


@concrete
class Transformer(LanguageModel, TransformerDecoder):
    """A decoder-only Transformer: tokens in, logits of the next token out. It has GPT-2's shape, Llama's, or one
    between.

    Set ``checkpoint_activations = True`` to keep only each block's input for the backward, and to compute the rest
    again.

    Raises:
        ValueError: ``config`` has an encoder, or another decoder.
    """

    reads_all = True

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        return config.encoder == "none" and config.decoder == "transformer"


@concrete
class RNN(LanguageModel, RecurrentDecoder):
    """A recurrent language model: ``config.decoder`` is "lstm" or "gru".

    Raises:
        ValueError: ``config`` has an encoder, or another decoder.
    """

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        return config.encoder == "none" and config.decoder in ("lstm", "gru")
