"""16-bit models on a CPU beside the same model in float32, with PyTorch alone and accelerated, in turns:

    python -m fastllm.bench.narrow_models [--size small|medium ...] [--rounds 5] [--out FILE.json]

Llamas of transformers' own code with random weights, 2 x 64 tokens: a training step (forward and backward, labels), a
forward without gradients, and a forward of one token. The peak is what a process of its own grows by while it builds
the model and takes 2 steps. On a CPU without 16-bit products, PyTorch's 16-bit step of the larger model takes minutes,
and is left out. To see a CPU with AVX2 alone, set the caps that ``fastllm info`` names.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastllm

from .. import cpu
from ..parser import first_paragraph
from .environment import environment
from .memory import peak
from .timing import interleaved

# Name -> the Llama's configuration: 18, 134 and 0.01 million parameters.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3,
        "num_attention_heads": 8,
    },
    "medium": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip
BATCH, LENGTH = 2, 64


class Way(NamedTuple):
    """A dtype by name, and whether fastllm.accelerate was called."""

    dtype: str
    accelerated: bool

    def __str__(self):
        return f"{self.dtype}{', accelerated' if self.accelerated else ''}"


WAYS = [Way(dtype, accelerated) for dtype in ("float32", "bfloat16", "float16") for accelerated in (False, True)]
BASELINE = WAYS[0]


def ways(size: str) -> list[Way]:
    """Those that are timed; see the module's docstring."""
    return [w for w in WAYS if size == "small" or w.accelerated or cpu.multiplies(getattr(torch, w.dtype))]


def build(size: str, way: Way) -> torch.nn.Module:
    """A Llama with random weights, accelerated where ``way`` says so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=LENGTH)
    # Made in its dtype, so that the peak has no float32 copy.
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, way.dtype))
    if way.accelerated:
        fastllm.accelerate(model)
    return model


def calls(model: torch.nn.Module, vocabulary: int) -> dict[str, Callable[[], object]]:
    """Name -> one call of the model."""
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    def forward(tokens):
        with torch.no_grad():
            model(tokens)

    return {"step": step, "forward": lambda: forward(ids), "one token": lambda: forward(ids[:1, :1])}


def times(size: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Call -> way -> seconds, the ways in turns."""
    models = {way: build(size, way) for way in ways(size)}
    made = {way: calls(model, SIZES[size]["vocab_size"]) for way, model in models.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for name in next(iter(made.values())):
        many = 5 * rounds if name == "one token" else rounds
        found[name] = interleaved({str(way): made[way][name] for way in models}, many, torch.device("cpu"))
    return found


def _peak_here(size: str, way: Way) -> int:
    """The memory of this process, after a tiny model has made the libraries' own allocations."""
    tiny = build("tiny", way)
    calls(tiny, SIZES["tiny"]["vocab_size"])["step"]()
    del tiny
    gc.collect()

    def work():
        step = calls(build(size, way), SIZES[size]["vocab_size"])["step"]
        step()
        step()

    return peak(work)


def peaks(size: str) -> dict[str, int]:
    """Way -> bytes, each in a process of its own."""
    found = {}
    for way in ways(size):
        command = [sys.executable, "-m", __spec__.name, "--peak", size, way.dtype, str(int(way.accelerated))]
        found[str(way)] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def table(size: str, found: dict) -> str:
    """Medians by way and call, and the peaks, as text."""
    columns = [*found["seconds"], "peak"]
    lines = [f"{size}: {found['parameters'] / 1e6:.1f} million parameters, {BATCH} x {LENGTH} tokens"]
    lines.append(f"{'':<24}" + "".join(f"{name:>24}" for name in columns))
    for way in ways(size):
        cells = []
        for samples in found["seconds"].values():
            median, base = (statistics.median(samples[str(w)]) for w in (way, BASELINE))
            cells.append(f"{median * 1e3:,.1f} ms ({base / median:.2f})")
        bytes_ = found["peak_bytes"].get(str(way))
        cells.append(f"{bytes_ / 1e6:,.0f} MB" if bytes_ else "-")
        lines.append(f"{way!s:<24}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.narrow_models", description=first_paragraph(__doc__))
    parser.add_argument("--size", nargs="+", choices=("small", "medium"), default=["small"])
    parser.add_argument(
        "--rounds", type=int, default=5, help="samples of a step and a forward; 5 times that of one token"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="for every sample, as JSON")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak:
        size, dtype, accelerated = options.peak
        print(_peak_here(size, Way(dtype, accelerated == "1")))
        return
    print(f"CPU: {cpu.summary()}; {torch.get_num_threads()} threads; in brackets the speed of {BASELINE}")
    results = {"environment": environment(torch.device("cpu")), "sizes": {}}
    for size in options.size:
        parameters = sum(p.numel() for p in build(size, BASELINE).parameters())
        found = {"parameters": parameters, "peak_bytes": peaks(size), "seconds": times(size, options.rounds)}
        results["sizes"][size] = found
        print(table(size, found), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
