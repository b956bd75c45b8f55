"""A small convolutional network over the blocks of a page in their order. Numpy evaluates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# How far apart the three blocks lie that each convolution sees.
DILATIONS = (1, 4)
# Features are scaled to a variance of 1 and cut at this. A guess.
MOST = 4.0
# Rows whose features are scaled at once: a bound on memory. A guess.
_ROWS = 2048


@dataclass(frozen=True)
class Network:
    """A layer for each block alone, convolutions that are added to it, the page's mean, and a layer for the log-odds.

    Attributes:
        mean, scale: (features,), what is taken off a feature and what it is multiplied with then.
        layer, layer_bias: (features, width) and (width,).
        convolutions, convolution_biases: (convolutions, 3, width, width) and (convolutions, width). The three are for
            the block :data:`DILATIONS` before, the block itself, and the one after.
        page, page_bias, of_page: (width, width), (width,), (width, width); what is averaged over the page, and what
            the mean is multiplied with.
        output, output_bias: (width,) and ().
    """

    mean: np.ndarray
    scale: np.ndarray
    layer: np.ndarray
    layer_bias: np.ndarray
    convolutions: np.ndarray
    convolution_biases: np.ndarray
    page: np.ndarray
    page_bias: np.ndarray
    of_page: np.ndarray
    output: np.ndarray
    output_bias: np.ndarray

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """The probability (blocks,) that each block is main text, of ``rows`` (blocks, features) of one page."""
        state = np.empty((len(rows), len(self.layer_bias)), np.float32)
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS] - self.mean
            part *= self.scale
            np.clip(part, -MOST, MOST, out=part)
            np.maximum(part @ self.layer + self.layer_bias, 0, out=state[begin : begin + _ROWS])
        for dilation, weights, bias in zip(DILATIONS, self.convolutions, self.convolution_biases, strict=True):
            before, at, after = weights
            seen = state @ at + bias
            seen[dilation:] += state[:-dilation] @ before
            seen[:-dilation] += state[dilation:] @ after
            state += np.maximum(seen, 0)
        page = np.maximum(state @ self.page + self.page_bias, 0).mean(0)
        odds = np.maximum(state + page @ self.of_page, 0) @ self.output + self.output_bias
        return 1 / (1 + np.exp(-np.clip(odds.astype(np.float64), -30, 30)))

    def arrays(self) -> dict[str, np.ndarray]:
        """What :meth:`of` reads: the weights in fp16, the scaling in fp32."""
        exact = ("mean", "scale")
        return {name: np.asarray(of, np.float32 if name in exact else np.float16) for name, of in vars(self).items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Network:
        return cls(**{name: arrays[name].astype(np.float32) for name in cls.__dataclass_fields__})
