"""A convolutional encoder: what n-grams of tokens stand around each place (Kim 2014), in blocks around a residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import nn as fast
from .blocks import Residual, Stream
from .cache import Encoded
from .config import ModelConfig
from .embedding import Embedded, make_norm
from .stack import length_mask, run_blocks

# Tokens that the filters see; each width has its share of the filters.
WIDTHS = (2, 3, 4)


class ConvBlock(Residual):
    """Filters over the places around each token, ReLU, and a projection back into the stream.

    A filter is a row of a matrix over the windows of its width, so that Muon updates it as a matrix.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        size, count = config.hidden_size, len(WIDTHS)
        self.conv_norm = make_norm(config)
        self.filters = nn.ModuleList(
            fast.Linear(width * size, size // count + (number < size % count), bias=config.bias)
            for number, width in enumerate(WIDTHS)
        )
        self.out = fast.Linear(size, size, bias=config.bias)

    def projections(self) -> list[nn.Linear]:
        """What writes into the residual stream."""
        return [self.out]

    def _filtered(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # Beyond a text's ends there is nothing, whatever padding follows it.
        x = x if mask is None else x * mask[..., None]
        length, found = x.shape[1], []
        for width, filters in zip(WIDTHS, self.filters, strict=True):
            before = width // 2
            padded = F.pad(x, (0, 0, before, width - 1 - before))
            found.append(filters(torch.cat([padded[:, i : i + length] for i in range(width)], -1)))
        return self.out(F.relu(torch.cat(found, -1)))

    def forward(self, stream: Stream, mask: torch.Tensor | None, layer: int) -> Stream:
        return self.add(stream, self.conv_norm, lambda x: self._filtered(x, mask))


class ConvEncoder(Embedded):
    """Embeddings, convolutional blocks and the last norm, without positions."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, positions=False)
        self.blocks = nn.ModuleList(ConvBlock(config) for _ in range(config.encoder_layers))
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()

    def encode(
        self, tokens: torch.Tensor, lengths: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> Encoded:
        """As :meth:`fastllm.models.stack.TransformerEncoder.encode`."""
        self.check_tokens(tokens)
        mask = None if lengths is None else length_mask(tokens, lengths)
        states = run_blocks(self, self.embed(tokens, None, segments), mask)
        return Encoded(states if mask is None else states * mask[..., None], mask)
