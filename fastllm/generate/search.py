"""The likeliest continuations: greedy and beam search, for decoders and for encoder-decoders, on their caches."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch

from ..config import InputError, check_whole_number
from ..models import DecoderCache, Encoded, EncoderDecoder
from ..models.mode import evaluation_mode
from .sampling import NOT_FINITE, check_model, check_stop_token


class Hypothesis(NamedTuple):
    """A continuation without its stop token, and its log-probability / length^length_penalty, stop token counted."""

    tokens: list[int]
    score: float


def _logits(
    model, tokens: torch.Tensor, memory: Encoded | None, cache: DecoderCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits (B, V) of the token after the last of ``tokens`` (B, T), and whether each row's largest is finite."""
    if isinstance(model, EncoderDecoder):
        logits = model.last_logits(tokens, memory, cache).float()
    else:
        logits = model.last_logits(tokens, cache).float()
    return logits, logits.amax(-1).isfinite().all()


def _is_over(over: torch.Tensor, finite: torch.Tensor) -> bool:
    """``over`` of a step whose logits are ``finite``, in one read, since each waits for the device.

    Raises:
        InputError: they are not.
    """
    is_over, is_finite = torch.stack((over, finite)).tolist()
    if not is_finite:
        raise InputError(NOT_FINITE)
    return is_over


def _check(model, start: torch.Tensor, max_new_tokens: int, stop_token: int) -> int:
    check_model(model)
    if not isinstance(start, torch.Tensor):
        raise TypeError(f"start must be a tensor, got {type(start).__name__}")
    check_whole_number("max_new_tokens", max_new_tokens, 1)
    check_stop_token(model, stop_token)
    if start.dim() != 2 or not start.numel():
        raise ValueError(f"start must be (batch, length) with at least one token each, got {list(start.shape)}")
    room = model.config.context_length - start.shape[1] + 1
    if room < 1:
        raise ValueError(f"start reaches past context_length {model.config.context_length}")
    return min(max_new_tokens, room)


def greedy(
    model, start: torch.Tensor, *, memory: Encoded | None = None, max_new_tokens: int, stop_token: int
) -> list[list[int]]:
    """For each row of ``start`` (B, T) the likeliest token again and again, up to ``stop_token``, which is left out.

    Args:
        memory: the encoder's states, for an encoder-decoder.
        max_new_tokens: no more than this, nor than the model's context holds.

    Raises:
        ValueError: an argument is out of its range, or the model gives a NaN.
        TypeError: an argument is of another kind.
    """
    steps = _check(model, start, max_new_tokens, stop_token)
    with evaluation_mode(model), torch.inference_mode():
        cache = model.new_cache(len(start))
        tokens, result = start, []
        ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        for _ in range(steps):
            logits, finite = _logits(model, tokens, memory, cache)
            token = logits.argmax(-1)
            memory = None
            ended |= token == stop_token
            result.append(torch.where(ended, stop_token, token))
            tokens = token[:, None]
            if _is_over(ended.all(), finite):
                break
    rows = torch.stack(result, 1).tolist()
    return [row[: row.index(stop_token)] if stop_token in row else row for row in rows]


class _Finished(NamedTuple):
    """The best finished continuations of each row: ``scores`` (B, beams), best first, -inf where there are fewer.

    ``paths`` (B, beams, steps) are their tokens, of which the first ``lengths`` (B, beams) count.
    """

    scores: torch.Tensor
    paths: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def none(cls, paths: torch.Tensor) -> _Finished:
        """No continuation yet, with room for as many as ``paths``."""
        scores = torch.full(paths.shape[:2], -torch.inf, device=paths.device)
        return cls(scores, paths.clone(), torch.zeros(paths.shape[:2], dtype=torch.long, device=paths.device))

    def with_more(self, scores: torch.Tensor, paths: torch.Tensor, length: int) -> _Finished:
        """The best of these and of those in ``paths``, which end after ``length`` tokens."""
        count, steps = self.paths.shape[1:]
        best, order = torch.cat((self.scores, scores), 1).topk(count, 1)
        lengths = torch.cat((self.lengths, torch.full_like(self.lengths, length)), 1).gather(1, order)
        kept = torch.cat((self.paths, paths), 1).gather(1, order[..., None].expand(-1, -1, steps))
        return _Finished(best, kept, lengths)


def beam_search(
    model, start: torch.Tensor, *, memory: Encoded | None = None, beams: int = 5, max_new_tokens: int, stop_token: int,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:  # fmt: skip
    """For each row of ``start`` (B, T) the best continuations found, best first, at most ``beams``.

    A continuation ends with ``stop_token`` or at ``max_new_tokens``. In every step the ``beams`` likeliest unfinished
    ones go on; a row is done when none of them can come to beat what is finished. With as many beams as there are
    continuations the search is exhaustive. Rows do not depend on the batch.

    Args:
        memory: the encoder's states, for an encoder-decoder.
        length_penalty: what the length is raised to before it divides the log-probability (Wu et al. 2016, in the
            simple form); 0 favours short ones.

    Raises:
        ValueError: an argument is out of its range, or the model gives a NaN.
        TypeError: an argument is of another kind.
    """
    steps = _check(model, start, max_new_tokens, stop_token)
    check_whole_number("beams", beams, 1)
    if not isinstance(length_penalty, Real):
        raise TypeError(f"length_penalty must be a number, got {length_penalty!r}")
    if not 0.0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")
    batch, device = len(start), start.device
    with evaluation_mode(model), torch.inference_mode():
        cache = model.new_cache(batch)
        logits, finite = _logits(model, start, memory, cache)
        first = torch.arange(batch, device=device)
        cache.select(first.repeat_interleave(beams))
        logits = logits.repeat_interleave(beams, 0)
        # Only one of the equal copies may go on.
        live = torch.full((batch, beams), -torch.inf, device=device)
        live[:, 0] = 0.0
        paths = torch.full((batch, beams, steps), stop_token, device=device)
        done = _Finished.none(paths)
        for step in range(steps):
            total = live[..., None] + logits.log_softmax(-1).view(batch, beams, -1)
            done = done.with_more(total[..., stop_token] / (step + 1) ** length_penalty, paths, step)
            total[..., stop_token] = -torch.inf
            live, place = total.flatten(1).topk(min(beams, total[0].numel()), 1)
            if live.shape[1] < beams:
                live = torch.nn.functional.pad(live, (0, beams - live.shape[1]), value=-torch.inf)
                place = torch.nn.functional.pad(place, (0, beams - place.shape[1]))
            parent, token = place // total.shape[-1], place % total.shape[-1]
            paths = paths.gather(1, parent[..., None].expand(-1, -1, steps)).clone()
            paths[..., step] = token
            # A log-probability only falls: divided by the greatest length it bounds the score that a beam can reach.
            over = (live.max(1).values / steps**length_penalty <= done.scores.min(1).values).all()
            is_over = _is_over(over, finite)
            if step + 1 == steps:
                done = done.with_more(live / steps**length_penalty, paths, steps)
                break
            if is_over:
                break
            cache.select((first[:, None] * beams + parent).flatten(), same_memory=True)
            logits, finite = _logits(model, token.view(-1, 1), None, cache)
    rows = zip(done.paths.tolist(), done.lengths.tolist(), done.scores.tolist(), strict=True)
    return [[Hypothesis(p[:n], s) for p, n, s in zip(*row, strict=True) if s > -float("inf")] for row in rows]
