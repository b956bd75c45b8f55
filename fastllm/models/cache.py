"""What a decoder keeps of the tokens that it has seen, so that the next one costs one step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .config import ModelConfig


class Encoded(NamedTuple):
    """An encoder's output: ``states`` (B, S, hidden_size), and ``mask`` (B, S), True for tokens; None: all are."""

    states: torch.Tensor
    mask: torch.Tensor | None


class DecoderCache:
    """The number of tokens seen (``length``), and the keys and values of an encoder's states by layer, computed once,
    with their mask.

    A cache holds no gradients, so it works only without them.
    """

    def __init__(self, batch_size: int):
        self.length = 0
        self.batch_size = batch_size
        self.memory: dict[int, tuple[torch.Tensor, ...]] = {}
        self.memory_mask: torch.Tensor | None = None

    def _check(self, *tensors: torch.Tensor) -> None:
        if any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError("a key/value cache keeps no gradient: call the model under torch.no_grad()")
        self._check_batch(len(tensors[0]))

    def _check_batch(self, got: int) -> None:
        if got != self.batch_size:
            raise ValueError(f"the cache was made for {self.batch_size} sequences, got {got}")

    def read(self, memory: Encoded | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """States and mask for cross-attention: ``memory``'s, whose mask is kept for the calls that give none."""
        if memory is not None:
            self.memory_mask = memory.mask
        return None if memory is None else memory.states, self.memory_mask

    def select(self, index: torch.Tensor, *, same_memory: bool = False) -> None:
        """Continue with the sequences ``index`` (any number, repeats allowed), as a beam search does.

        ``same_memory``: each of them replaces a sequence that read the same encoder's states, so the states are not
        copied.
        """
        self.batch_size = len(index)
        if same_memory:
            return
        self.memory = {layer: tuple(t[index] for t in held) for layer, held in self.memory.items()}
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[index]


def check_cache(cache: DecoderCache | None, kind: type[DecoderCache]) -> None:
    """Raise TypeError where ``cache`` is neither None nor of ``kind``, which the decoder's own ``new_cache`` makes."""
    if cache is not None and not isinstance(cache, kind):
        raise TypeError(f"cache must be a {kind.__name__}, which new_cache makes, got {type(cache).__name__}")


def _nobody() -> None:
    """The decoder of a cache that was read from a file."""


class KVCache(DecoderCache):
    """Space for the keys and values of ``batch_size`` sequences, (B, kv_heads, context_length, head_dim) per layer.

    The model advances ``length`` after its last layer. Setting it back drops tokens from the end. ``made_by()`` is the
    decoder that made the cache, which alone uses what follows. ``step`` is what it calls for one more token of each
    sequence (:mod:`.next_token`), or None. ``relative_bias`` is what relative positions add to the scores of the last
    position, (1, H, 1, context_length), once a step has needed it; an earlier position's are the end of it.
    """

    def __init__(self, config: ModelConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__(batch_size)
        self.step: Callable[..., torch.Tensor] | None = None
        # A weak reference: a cache keeps no model.
        self.made_by: Callable[[], object] = _nobody
        self.relative_bias: torch.Tensor | None = None
        shape = (2, config.num_layers, batch_size, config.kv_heads, config.context_length, config.head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)

    def __getstate__(self) -> dict[str, Any]:
        """What any decoder of the shape goes on with: the step holds modules, which are in no file of a cache."""
        return self.__dict__ | {"step": None, "made_by": _nobody, "relative_bias": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A copy for the same decoder."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ |= copy.deepcopy(self.__getstate__(), memo)
        copied.step, copied.made_by = self.step, self.made_by
        return copied

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, kv_heads, T, head_dim) after the tokens that it holds; returns all keys and values up to there.

        Raises:
            ValueError: the cache was made for another number of sequences.
            RuntimeError: ``key`` or ``value`` requires a gradient, which would be lost.
        """
        self._check(key, value)
        end = self.length + key.shape[2]
        for held, new in zip(self._store, (key, value), strict=True):
            held[layer, :, :, self.length : end] = new
        keys, values = self._store[:, layer, :, :, :end].to(key.dtype)
        return keys, values

    def room(
        self, batch_size: int
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """For each layer, the place of the next token's key and value, (2, B, kv_heads, head_dim), and all keys and
        values up to it.

        Raises:
            ValueError: the cache was made for another number of sequences.
        """
        self._check_batch(batch_size)
        keys, values = self._store[:, :, :, :, : self.length + 1]
        return self._store[:, :, :, :, self.length].unbind(1), keys.unbind(0), values.unbind(0)

    def select(self, index: torch.Tensor, *, same_memory: bool = False) -> None:
        super().select(index, same_memory=same_memory)
        # Only the tokens held are copied, and no new room is taken where the number of sequences stays.
        held = self._store[:, :, :, :, : self.length][:, :, index]
        if len(index) != self._store.shape[2]:
            self._store = self._store.new_empty((*self._store.shape[:2], len(index), *self._store.shape[3:]))
        self._store[:, :, :, :, : self.length] = held


class RecurrentCache(DecoderCache):
    """The state of each recurrent layer after ``length`` tokens. Tokens cannot be dropped from it one by one."""

    def __init__(self, batch_size: int):
        super().__init__(batch_size)
        self._states: dict[int, tuple[torch.Tensor, ...]] = {}

    def state(self, layer: int) -> tuple[torch.Tensor, ...] | None:
        """The tensors of ``layer``'s state, each (1, B, hidden_size); None before the first token."""
        return self._states.get(layer) if self.length else None

    def store(self, layer: int, state: tuple[torch.Tensor, ...]) -> None:
        """Keep ``state``, each (1, B, hidden_size).

        Raises:
            ValueError: the cache was made for another number of sequences.
            RuntimeError: a state requires a gradient, which would be lost.
        """
        self._check(*(tensor[0] for tensor in state))
        self._states[layer] = state

    def select(self, index: torch.Tensor, *, same_memory: bool = False) -> None:
        super().select(index, same_memory=same_memory)
        self._states = {layer: tuple(t[:, index] for t in state) for layer, state in self._states.items()}
