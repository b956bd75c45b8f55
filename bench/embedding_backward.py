"""The table's gradient beside PyTorch's, in pairs: ``python -m fastllm.bench.embedding_backward [--json FILE]``.

32,768 Zipf ids in a table of 50304 x 768. Fresh: backward makes the gradient. Reused: there is one already, and
backward adds to it (micro-batches, ``zero_grad(set_to_none=False)``). Sum: forward and backward of token + position +
segment embeddings beside three lookups and two additions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as torch_F

from ..functional import embedding, embedding_sum
from ..parser import first_paragraph
from ..registry import Sample
from . import embedding as lookups
from . import embedding_sum as sums
from .environment import environment
from .timing import interleaved, ratios, seconds

# Rounds of a pair. A guess.
ROUNDS = 15


def ours(ids, weight):
    """A lookup whose gradient is added into ``weight.grad``, where there is one."""
    return embedding(ids, weight, main_grad=weight.grad)


def backward_alone(function: Callable, sample: Sample, *, reused: bool) -> Callable:
    """Prepares a backward pass of a lookup, and returns it to be timed."""
    ids, weight = sample.args
    upstream = weight.new_ones(*ids.shape, weight.shape[1])
    grad = torch.ones_like(weight) if reused else None

    def prepare():
        # Zeroed in place: pages that were never written would burden whoever writes more of them.
        weight.grad = None if grad is None else grad.zero_()
        rows = function(ids, weight)
        return lambda: rows.backward(upstream)

    return prepare


def whole_sum(function: Callable, sample: Sample) -> Callable:
    """Prepares a forward and backward pass of a sum, and returns it to be timed."""
    indices, weights = sample.args
    upstream = weights[0].new_ones(*indices[0].shape, weights[0].shape[1])

    def prepare():
        for weight in weights:
            weight.grad = None
        return lambda: function(indices, weights).backward(upstream)

    return prepare


def three_lookups(indices, weights):
    """PyTorch's sum of several lookups."""
    return sum(torch_F.embedding(ids, weight) for ids, weight in zip(indices, weights, strict=True))


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """Name -> what prepares ours, and PyTorch's."""
    sample = lookups.shapes["GPT-2 32k tokens, 50304x768"](device, dtype)
    tables = sums.shapes["BERT-base 32x512, 30522+512+2 x768"](device, dtype)
    both = {"fastllm": ours, "torch": torch_F.embedding}
    return {
        "backward, fresh gradient": {name: backward_alone(f, sample, reused=False) for name, f in both.items()},
        "backward, reused gradient": {name: backward_alone(f, sample, reused=True) for name, f in both.items()},
        "sum of three, forward and backward": {
            "fastllm": whole_sum(embedding_sum, tables),
            "torch": whole_sum(three_lookups, tables),
        },
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.embedding_backward", description=first_paragraph(__doc__))
    parser.add_argument("--json", type=Path, metavar="FILE", help="for every sample")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, pair in cases(device, dtype).items():
            times = interleaved(pair, ROUNDS, device, timer=lambda prepare, device: seconds(prepare(), device))
            ratio = ratios(times, "fastllm", "torch")
            label = str(dtype).removeprefix("torch.")
            print(f"{label:<9} {name:<36} {ratio.median:5.2f}x torch ({ratio.low:.2f} to {ratio.high:.2f})", flush=True)
            rows.append({"dtype": label, "case": name, "ratio": asdict(ratio), "seconds": times})
    if options.json:
        content = {"environment": environment(device), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
