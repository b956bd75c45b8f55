"""Learns the network of :mod:`fastllm.data.clean.block_network` with torch, for :mod:`.main_text_training`.

A width of 64, 15 epochs, a dropout of 0.3 and all other numbers here are first guesses. No others were tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.clean.block_network import DILATIONS, MOST, Network

WIDTH, DROPOUT, OF_FEATURES = 64, 0.3, 0.1
EPOCHS, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 15, 2e-3, 0.05, 0.15
# Longer pages are learned in parts. Blocks in a batch, padding and all.
PART, BATCH = 1500, 6000
# Features that hardly vary weigh little.
LEAST_SPREAD = 1e-3
# Batches hold pages of about the same number of blocks.
ALIKE = 40


@dataclass(frozen=True)
class Examples:
    """Pages: their blocks' features (blocks, features), the shares that are main text, and what each block weighs."""

    rows: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]


class _Module(nn.Module):
    """The network as it is learned; for what it is made of see :class:`Network`."""

    def __init__(self, features: int):
        super().__init__()
        self.features_dropout, self.dropout = nn.Dropout(OF_FEATURES), nn.Dropout(DROPOUT)
        self.layer = nn.Linear(features, WIDTH)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(WIDTH, WIDTH, 3, padding=dilation, dilation=dilation) for dilation in DILATIONS
        )
        self.page, self.of_page = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, 1)

    def forward(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-odds (pages, blocks) of ``rows`` (pages, blocks, features); ``mask`` is 0 where a page has no block."""
        there = mask[..., None]
        state = self.dropout(F.relu(self.layer(self.features_dropout(rows)))) * there
        for convolution in self.convolutions:
            seen = convolution(state.transpose(1, 2)).transpose(1, 2)
            state = (state + self.dropout(F.relu(seen))) * there
        page = (F.relu(self.page(state)) * there).sum(1) / mask.sum(1, keepdim=True)
        return self.output(F.relu(state + self.of_page(page)[:, None]))[..., 0]


def learn_network(examples: Examples, seed: int) -> Network:
    """A network that minimises the cross entropy of blocks by their weights."""
    every = np.concatenate(list(examples.rows))
    mean, scale = every.mean(0), 1 / (every.std(0) + LEAST_SPREAD)
    rows = [np.clip((page - mean) * scale, -MOST, MOST).astype(np.float32) for page in examples.rows]
    scaled = Examples(rows, examples.labels, examples.weights)
    draw = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _Module(every.shape[1])
        plan = [batch for _ in range(EPOCHS) for batch in _batches(rows, draw)]
        optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=len(plan), pct_start=WARM_UP
        )
        of_a_page = sum(weights.sum() for weights in examples.weights) / len(rows)
        for batch in plan:
            given, labels, weights, mask = _padded(scaled, batch)
            losses = F.binary_cross_entropy_with_logits(module(given, mask), labels, reduction="none")
            optimizer.zero_grad()
            ((losses * weights).sum() / len(batch) / of_a_page).backward()
            optimizer.step()
            schedule.step()
    return _network(module, mean, scale)


# A page, and where in its blocks the part begins and ends.
_Part = tuple[int, int, int]


def _batches(rows: Sequence[np.ndarray], draw: np.random.Generator) -> list[list[_Part]]:
    parts = [
        (number, begin, min(begin + PART, len(page)))
        for number, page in enumerate(rows)
        for begin in range(0, len(page), PART)
    ]
    parts = [parts[at] for at in draw.permutation(len(parts))]
    parts.sort(key=lambda part: (part[2] - part[1]) // ALIKE)
    batches: list[list[_Part]] = [[]]
    longest = 0
    for part in parts:
        longest = max(longest, part[2] - part[1])
        if batches[-1] and longest * (len(batches[-1]) + 1) > BATCH:
            batches.append([])
            longest = part[2] - part[1]
        batches[-1].append(part)
    return [batches[at] for at in draw.permutation(len(batches))]


def _padded(examples: Examples, batch: list[_Part]) -> tuple[torch.Tensor, ...]:
    """Rows, labels and weights, 0 where a page of the batch has no block, and the mask that says where."""
    longest = max(end - begin for _, begin, end in batch)
    columns = [torch.zeros(len(batch), longest, *tail) for tail in ((examples.rows[0].shape[1],), (), (), ())]
    for at, (page, begin, end) in enumerate(batch):
        of_page = (examples.rows[page], examples.labels[page], examples.weights[page])
        for column, values in zip(columns, of_page, strict=False):
            column[at, : end - begin] = torch.from_numpy(values[begin:end])
        columns[-1][at, : end - begin] = 1
    return tuple(columns)


def _network(module: _Module, mean: np.ndarray, scale: np.ndarray) -> Network:
    of = {name: values.detach().numpy() for name, values in module.state_dict().items()}
    convolutions = range(len(DILATIONS))
    return Network(
        mean, scale, of["layer.weight"].T, of["layer.bias"],
        np.stack([of[f"convolutions.{number}.weight"].transpose(2, 1, 0) for number in convolutions]),
        np.stack([of[f"convolutions.{number}.bias"] for number in convolutions]),
        of["page.weight"].T, of["page.bias"], of["of_page.weight"].T, of["output.weight"][0], of["output.bias"][0],
    )  # fmt: skip
