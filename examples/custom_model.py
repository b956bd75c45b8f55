"""A model of your own on the ops: fused residual norms, SwiGLU, and a loss that never holds all the logits.

python examples/custom_model.py --steps 100
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import fastllm.functional as F
import fastllm.nn as fnn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = fnn.AddRMSNorm(width)  # adds the residual and normalises in one pass
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x, residual):
        x, residual = self.norm(x, residual)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.out(attended.transpose(1, 2).flatten(-2))
        x, residual = F.add_rms_norm(x, residual, (x.shape[-1],), self.norm.weight)
        return self.down(F.swiglu(self.gate_up(x))), residual


class Model(nn.Module):
    def __init__(self, vocab_size: int = 256, width: int = 64, heads: int = 4, layers: int = 2, context: int = 64):
        super().__init__()
        self.embedding = fnn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def loss(self, tokens, targets):
        residual = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        x = torch.zeros_like(residual)
        for block in self.blocks:
            x, residual = block(x, residual)
        return F.linear_cross_entropy((x + residual).flatten(0, 1), self.head.weight, targets.flatten())


def main(argv=None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.tensor(list(options.text.read_bytes()), device=device)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        at = torch.randint(len(text) - 65, (8, 1), device=device) + torch.arange(65, device=device)
        loss = model.loss(text[at[:, :-1]], text[at[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
