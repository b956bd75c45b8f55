"""Sampling from a decoder, one token at a time, on its key/value cache."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import NamedTuple

import torch

from ..config import InputError, check_whole_number
from ..models.mode import evaluation_mode

# Below it the division could overflow, and only the likeliest token is left anyway.
COLDEST = 1e-30
NOT_FINITE = "the model's scores are not finite: nothing can be drawn from them"


def filter_logits(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """``logits`` (..., V) in fp32, divided by ``temperature``, -inf outside the ``top_k`` largest and the nucleus.

    Exactly ``top_k`` are kept, also where several are equal to the least of them.
    The nucleus is the smallest set of most likely tokens whose probabilities reach ``top_p`` (Holtzman et al. 2020);
    it always holds the most likely one.

    Raises:
        ValueError, TypeError: an argument is out of its range, or no number; ``temperature`` is at least 1e-30 here.
    """
    check_sampling(0, temperature, top_k, top_p)
    if temperature < COLDEST:
        raise ValueError(f"temperature must be at least {COLDEST} where logits are divided by it, got {temperature}")
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        largest = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, largest.indices, largest.values)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        beyond[..., :1] = False  # a top_p below fp32's least number is 0 there
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


class Sampling(NamedTuple):
    """How the next token is drawn; the arguments of :func:`generate` of the same names."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


def check_model(model) -> None:
    """Raise TypeError where ``model`` gives no next token. A compiled model is of another class."""
    if not hasattr(model, "last_logits"):
        raise TypeError(f"model must be a language model, got {type(model).__name__}")


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None = None
) -> None:
    """Raise ValueError for a sampling argument out of its range, TypeError for one that is no number of its kind."""
    check_whole_number("max_new_tokens", max_new_tokens, 0)
    for name, value, least in (("top_k", top_k, 1), ("seed", seed, None)):
        if value is not None:
            check_whole_number(name, value, least)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, Real) and (value is not None or name == "temperature"):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 (0 takes the likeliest token), got {temperature}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and less than 2^64, got {seed}")


def check_stop_token(model, stop_token: int) -> None:
    """Raise TypeError for a token that is no number, ValueError for one that the model never gives."""
    check_whole_number("stop_token", stop_token)
    if not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(f"stop_token must be in the vocabulary of {model.config.vocab_size}, got {stop_token}")


def generate(
    model,
    tokens: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` tokens that continue ``tokens``, as they are drawn.

    Args:
        model: a :class:`fastllm.models.Transformer`; it is run in evaluation mode and left as it was.
        tokens: the prompt's token ids, at least one. Beyond the model's context only its end is seen.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: sample only from the k likeliest tokens, and from the nucleus of probability p.
        seed: makes the draw repeatable, without touching torch's global generators.
        stop_token: ends the stream; it is not yielded.

    When the context is full, its newer half is read again and the older half forgotten.

    Raises:
        ValueError: an argument is out of its range, the prompt is empty, or, in the stream, the model gives a NaN.
        TypeError: an argument is no number of its kind.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    check_model(model)
    if stop_token is not None:
        check_stop_token(model, stop_token)
    prompt = _ids(tokens)
    if not prompt:
        raise ValueError("tokens must hold at least one token to continue from")
    sampling = Sampling(temperature, top_k, top_p, seed)
    return _stream(model, prompt, max_new_tokens, sampling, stop_token)


def _ids(tokens) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        got = repr(tokens) if isinstance(tokens, str) else type(tokens).__name__
        raise TypeError(f"tokens must be a sequence of token ids, got {got}: {error}") from error


def _stream(model, tokens, max_new_tokens, sampling: Sampling, stop_token):
    context = model.config.context_length
    device = model.head.weight.device
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    with evaluation_mode(model):
        cache = model.new_cache()
        fresh = torch.tensor([tokens[-context:]], device=device)
        for _ in range(max_new_tokens):
            if cache.length + fresh.shape[1] > context:
                cache.length = 0
                fresh = torch.tensor([tokens[-max(1, context // 2) :]], device=device)
            with torch.inference_mode():
                logits = model.last_logits(fresh, cache)[0]
                drawn = _draw(logits, sampling, generator)
                # One read, since each waits for the device.
                token, finite = torch.stack((drawn, logits.max().isfinite().to(drawn.dtype))).tolist()
                if not finite:
                    raise InputError(NOT_FINITE)
            if token == stop_token:
                return
            tokens.append(token)
            fresh = drawn.view(1, 1)
            yield token


def _draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next token by its ``logits`` (V,), int64 scalar on their device; any where they are not finite."""
    if sampling.temperature < COLDEST:
        return logits.argmax()
    kept = filter_logits(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    # The token of torch.multinomial, which draws in this way but first waits twice for the device, to check its input.
    times = torch.empty_like(kept).exponential_(generator=generator)
    return (kept.softmax(-1) / times).argmax()
