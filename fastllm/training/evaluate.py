"""Scores on held-out data. Nothing here touches the state of training."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch

from ..data import TokenFile, evaluation_batches
from ..models.mode import evaluation_mode
from .device import autocast
from .objective import Batch, Evaluation, Objective, TrainedModel, target_count, to_device


def bits_per_byte(loss: float, tokens: TokenFile) -> float:
    """Nats per token as bits for each UTF-8 byte of the text, by the number of both in ``tokens``."""
    return loss / math.log(2) * (len(tokens) - 1) / tokens.bytes


@contextlib.contextmanager
def evaluating(model: TrainedModel) -> Iterator[None]:
    """Within the block ``model`` is in evaluation mode, without gradients: no random number is drawn."""
    with evaluation_mode(model), torch.no_grad():
        yield


def mean_losses(
    objective: Objective, model: TrainedModel, batches: Iterable[Batch], dtype: str
) -> tuple[dict[str, float], dict[str, int]]:
    """Each term's mean over all targets in ``batches``, and how many those are."""
    device = next(model.parameters()).device
    shares: defaultdict[str, list[tuple[torch.Tensor, int]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for batch in batches:
        here = {name: count for name, count in objective.counts(batch).items() if count}
        with autocast(device, dtype):
            losses = objective.losses(model, to_device(batch, device)) if here else {}
        for name, count in here.items():
            shares[name].append((losses[name], count))
            counts[name] += count
    return {name: total(shares[name]) / counts[name] for name in counts}, dict(counts)


def total(shares: list[tuple[torch.Tensor, int]]) -> float:
    """The sum of means, each times what it is a mean over. Read at once: until then a GPU's host need not wait."""
    means = torch.stack([mean for mean, _ in shares]).tolist()
    return sum(mean * count for mean, (_, count) in zip(means, shares, strict=True))


def evaluate(
    model: TrainedModel, tokens: TokenFile, context_length: int, batch_size: int, dtype: str = "float32", limit: int = 0
) -> Evaluation:
    """How well ``model`` predicts ``tokens``, in at most ``limit`` evenly spread windows; 0: in all windows.

    Each token except the first, which is an end-of-text, is scored once, in windows of ``context_length`` that overlap
    by half. After the first window every token has at least half a window of context. End-of-text tokens are scored,
    but have no bytes. Dropout is off, so no random number is drawn.
    """
    device = next(model.parameters()).device
    shares = []
    stride = max(1, context_length // 2)
    with evaluating(model):
        for inputs, targets in evaluation_batches(tokens.tokens, context_length, stride, batch_size, limit):
            batch = {"tokens": inputs, "targets": targets}
            here = to_device(batch, device)
            with autocast(device, dtype):
                shares.append((model.loss(here["tokens"], here["targets"]), target_count(batch)))
    nats, count = total(shares), sum(scored for _, scored in shares)
    scores = {"bits_per_byte": bits_per_byte(nats / count, tokens)}
    return Evaluation(nats / count, count, scores, whole=count == len(tokens) - 1)
