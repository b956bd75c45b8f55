"""nanoGPT's training loop with three lines changed: they end in ``# fastllm``.

python examples/nanogpt_loop.py --nanogpt FOLDER    # a clone of nanoGPT: its model.py
python examples/nanogpt_loop.py                     # the same interface, a small model that is written here
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastllm  # fastllm


class GPT(nn.Module):
    """What the loop needs of nanoGPT's model: ``logits, loss = model(idx, targets)``."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, 64), nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.h = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lm_head = nn.Linear(64, 256, bias=False)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], device=idx.device)
        logits = self.lm_head(self.h(x, mask=mask, is_causal=True))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def build(folder: Path | None) -> nn.Module:
    if folder is None:
        return GPT()
    sys.path.insert(0, str(folder))
    from model import GPT as NanoGPT
    from model import GPTConfig

    return NanoGPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64, dropout=0.0))


def main(argv=None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(argv)
    torch.manual_seed(1337)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.tensor(list(Path(__file__).read_bytes()), device=device)
    model = build(options.nanogpt).to(device)
    report = fastllm.accelerate(model)  # fastllm
    print(report)  # fastllm
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    losses = []
    for iter_num in range(options.steps):
        ix = torch.randint(len(data) - 65, (8,), device=device)
        X = torch.stack([data[i : i + 64] for i in ix])
        Y = torch.stack([data[i + 1 : i + 65] for i in ix])
        _, loss = model(X, Y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if iter_num % 10 == 0:
            print(f"iter {iter_num}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
