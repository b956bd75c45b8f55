"""Time and memory of linear_cross_entropy on a CPU, beside PyTorch's own ways, in pairs:

    python -m fastllm.bench.memory [--tokens 8192] [--hidden-size 512] [--vocab-size 50304] [--workspace 64]
        [--rounds 10] [--dtype float32|bfloat16] [--json FILE]

Each way runs forward and backward in this process; its peak is what the process grows by, over the inputs and with the
gradients, sampled every millisecond. PyTorch's chunks (torch >= 2.13) are given the rows that this library's plan has,
so that both hold as many logits. Rounds alternate the two; the ratio of a round is within that round. Samples go to
FILE as they come, beside those that are there of the same call, so a run may be made in pieces.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..functional import linear_cross_entropy, linear_cross_entropy_plan
from ..parser import first_paragraph
from .environment import environment
from .timing import order, ratios

PAGE = 4096


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak(call: Callable[[], object]) -> int:
    """Bytes that the process grew by at most while ``call`` ran."""
    gc.collect()
    base, most, done = resident(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, resident() - base)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return most


def ways(x, w, y, workspace: float) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> the loss of one call; the first is this library's."""
    found = {"fastllm": lambda: linear_cross_entropy(x, w, y, max_workspace_mb=workspace)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        rows = linear_cross_entropy_plan(x, w, max_workspace_mb=workspace).rows
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        found["torch, in chunks"] = lambda: F.linear_cross_entropy(x, w, y, options=options)
    found["torch, all logits"] = lambda: F.cross_entropy(F.linear(x, w), y)
    return found


def read(path: Path | None, call: dict) -> dict:
    """The results at ``path``, which must be of the same call; fresh ones where there are none."""
    fresh = {"environment": environment(torch.device("cpu")), "call": call, "peak_bytes": {}, "seconds": {}}
    if path is None or not path.exists():
        return fresh
    found = json.loads(path.read_text("utf-8"))
    if found["call"] != call:
        raise SystemExit(f"{path} has results of another call, {found['call']}; give another --json")
    return {**found, "environment": fresh["environment"]}


def build_parser() -> argparse.ArgumentParser:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.memory", description=first_paragraph(__doc__))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--workspace", type=float, default=64.0, help="MiB")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10, help="pairs to time; 0 for memory alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="every sample, beside those already there")
    return parser


class Layer(NamedTuple):
    """Hidden states (tokens, D) and a head's weight (V, D), which get gradients, and targets (tokens,)."""

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor

    @classmethod
    def random(cls, tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> Layer:
        torch.manual_seed(0)
        x = torch.randn(tokens, hidden_size, dtype=dtype).requires_grad_()
        w = (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).to(dtype).requires_grad_()
        return cls(x, w, torch.randint(vocab_size, (tokens,)))

    @property
    def gradient_bytes(self) -> int:
        return (self.x.numel() + self.w.numel()) * self.x.dtype.itemsize

    def seconds(self, loss: Callable[[], torch.Tensor]) -> float:
        """Of forward and backward of ``loss``, which is this layer's; the gradients are new."""
        self.x.grad = self.w.grad = None
        start = time.perf_counter()
        loss().backward()
        return time.perf_counter() - start

    def allocate(self, workspace: float) -> None:
        """Take what the libraries allocate in their first calls, so that no peak has it."""
        few, narrow = (t[:64].detach().requires_grad_() for t in (self.x, self.w))
        for call in ways(few, narrow, self.y[:64] % 64, workspace).values():
            call().backward()


def _show_times(seconds: dict[str, list[float]], pair: list[str]) -> None:
    speed = ratios(seconds, *pair)
    print(
        f"{pair[0]} / {pair[1]} in time: median {1 / speed.median:.3f}, quartiles {1 / speed.high:.3f} to "
        f"{1 / speed.low:.3f}, over {len(seconds[pair[0]])} pairs"
    )
    print(f"median seconds: {', '.join(f'{name} {statistics.median(seconds[name]):.2f}' for name in pair)}")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    options = build_parser().parse_args(argv)
    layer = Layer.random(options.tokens, options.hidden_size, options.vocab_size, getattr(torch, options.dtype))
    plan = linear_cross_entropy_plan(layer.x, layer.w, max_workspace_mb=options.workspace)
    names = ("tokens", "hidden_size", "vocab_size", "workspace", "dtype")
    found = read(options.json, {name: getattr(options, name) for name in names} | {"rows": plan.rows})
    found["gradient_bytes"] = gradients = layer.gradient_bytes
    print(f"{plan}; gradients {gradients / 1e6:.1f} MB; {torch.get_num_threads()} threads, torch {torch.__version__}")
    calls = ways(*layer, options.workspace)
    pair = list(calls)[:2]

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")

    layer.allocate(options.workspace)
    for name, loss in calls.items() if not found["peak_bytes"] else ():
        layer.x.grad = layer.w.grad = None
        found["peak_bytes"][name] = peak(lambda loss=loss: layer.seconds(loss))
    save()
    for name, bytes_ in found["peak_bytes"].items():
        print(f"{name}: peak {bytes_ / 1e6:,.1f} MB, of which {(bytes_ - gradients) / 1e6:,.1f} beside the gradients")
    for turn in range(options.rounds):
        round_ = {name: layer.seconds(calls[name]) for name in order(pair, turn)}
        for name in pair:
            found["seconds"].setdefault(name, []).append(round_[name])
        save()
    if found["seconds"] and len(pair) == 2:
        _show_times(found["seconds"], pair)


if __name__ == "__main__":
    main()
