"""An encoder and a decoder with cross-attention: what translates."""

from __future__ import annotations

from typing import Any

import torch

from .cache import DecoderCache, Encoded
from .config import ModelConfig
from .embedding import INITIAL_STD
from .encoder import make_encoder
from .head import Head
from .next_token import last_logits
from .pretrained import Pretrained, concrete
from .rnn import RecurrentDecoder
from .stack import TransformerDecoder
from .transformer import flops_per_token


@concrete
class EncoderDecoder(Pretrained):
    """Source tokens in, logits of the next target token out. Either side may be a Transformer or recurrent.

    Both sides share one embedding and one vocabulary for both languages, and with tie_embeddings the head shares it
    too.

    Raises:
        ValueError: ``config`` lacks one of the two.
    """

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        return config.encoder != "none" and config.decoder != "none"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._check_fits(config)
        self.config = config
        self.encoder = make_encoder(config)
        decoder = TransformerDecoder if config.decoder == "transformer" else RecurrentDecoder
        self.decoder = decoder(config, cross=True)
        self.encoder.initialize()
        self.decoder.initialize()
        self.decoder.token_embedding = self.encoder.token_embedding
        self.head = Head(config.hidden_size, config.vocab_size, bias=False)
        torch.nn.init.normal_(self.head.weight, std=INITIAL_STD)
        if config.tie_embeddings:
            self.head.weight = self.encoder.token_embedding.weight

    @property
    def checkpoint_activations(self) -> bool:
        return self.encoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = value

    def encode(self, source: torch.Tensor, lengths: torch.Tensor | None = None) -> Encoded:
        """States of ``source`` (B, S), whose row b has ``lengths[b]`` tokens (all if None)."""
        return self.encoder.encode(source, lengths)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab_size) for a decoder's states."""
        logits = self.head(hidden)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def forward(
        self, tokens: torch.Tensor, memory: Encoded | None = None, cache: DecoderCache | None = None
    ) -> torch.Tensor:
        """Logits (B, T, vocab_size) of the token after each of ``tokens`` (B, T), given :meth:`encode`'s ``memory``.

        With a ``cache`` from :meth:`new_cache`, ``tokens`` follow the tokens that it holds, and ``memory`` is needed
        only in the first call.
        """
        return self.logits(self._decode(tokens, memory, cache))

    def last_logits(
        self, tokens: torch.Tensor, memory: Encoded | None = None, cache: DecoderCache | None = None
    ) -> torch.Tensor:
        """Logits (B, vocab_size) of the token after the last of ``tokens`` (B, T); arguments as :meth:`forward`'s."""
        return last_logits(self, self._decode(tokens, memory, cache)[:, -1])

    def _decode(self, tokens: torch.Tensor, memory: Encoded | None, cache: Any) -> torch.Tensor:
        if memory is None and (cache is None or not cache.memory):
            raise ValueError("memory: a decoder needs the encoder's states, or a cache that has read them")
        return self.decoder.decode(tokens, memory, cache)

    def loss(
        self, source: torch.Tensor, lengths: torch.Tensor | None, tokens: torch.Tensor, targets: torch.Tensor,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        """Mean cross-entropy in nats (fp32 scalar) of ``targets`` (B, T) given ``tokens``; -100 is ignored."""
        hidden = self.decoder.decode(tokens, self.encode(source, lengths))
        return self.head.loss(hidden, targets, self.config.logit_scale, label_smoothing)

    def new_cache(self, batch_size: int = 1) -> DecoderCache:
        """An empty cache of the decoder's for ``batch_size`` sequences."""
        return self.decoder.new_cache(batch_size)

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs per token if there are as many source tokens as target tokens, since each token passes through
        one half."""
        return flops_per_token(self, context_length or self.config.context_length) // 2
