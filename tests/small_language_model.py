"""A language model with a head, a norm and three embeddings, and the same accelerated."""

import copy

import torch
from torch import nn

import fastllm

V, D = 40, 16


class LanguageModel(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        self.positions = nn.Embedding(12, D)
        self.segments = nn.Embedding(2, D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=bias)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(positions)
        x = x + self.segments(ids % 2)
        return self.head(self.norm(x))


def pair(bias=True):
    model = LanguageModel(bias)
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    return model, other, torch.randint(V, (3, 7)), torch.randint(V, (3, 7))
