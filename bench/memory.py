"""Time and memory of linear_cross_entropy on a CPU, beside PyTorch's own ways, in pairs:

    python -m fastllm.bench.memory [--tokens 8192] [--hidden 512] [--vocabulary 50304] [--workspace 64] [--rounds 10]

Each way runs forward and backward in this process; its peak is what the process grows by, over the inputs and with the
gradients, sampled every millisecond. PyTorch's chunks (torch >= 2.13) are given the rows that this library's plan has,
so that both hold as many logits. Rounds alternate the two; the ratio of a round is within that round.
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

import torch
import torch.nn.functional as F

from ..functional import linear_cross_entropy, linear_cross_entropy_plan

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


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--workspace", type=float, default=64.0, help="MiB")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10, help="pairs to time; 0 for memory alone")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.hidden, dtype=dtype).requires_grad_()
    w = (torch.randn(options.vocabulary, options.hidden) / options.hidden**0.5).to(dtype).requires_grad_()
    y = torch.randint(options.vocabulary, (options.tokens,))
    plan = linear_cross_entropy_plan(x, w, max_workspace_mb=options.workspace)
    gradients = (x.numel() + w.numel()) * dtype.itemsize
    print(f"{plan}; gradients {gradients / 1e6:.1f} MB; {torch.get_num_threads()} threads, torch {torch.__version__}")

    calls = ways(x, w, y, options.workspace)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def run(name: str) -> None:
        x.grad = w.grad = None
        start = time.perf_counter()
        calls[name]().backward()
        seconds[name].append(time.perf_counter() - start)

    small = [t[:64].detach().requires_grad_() for t in (x, w)]
    for call in ways(*small, y[:64] % 64, options.workspace).values():
        call().backward()  # first-call allocations
    peaks = {}
    for name in calls:
        x.grad = w.grad = None
        peaks[name] = peak(lambda name=name: run(name))
        print(f"{name}: peak {peaks[name] / 1e6:,.1f} MB, of which {(peaks[name] - gradients) / 1e6:,.1f} beside them")
    pair = list(calls)[:2]
    for turn in range(options.rounds):
        for name in pair if turn % 2 == 0 else reversed(pair):
            run(name)
    if options.rounds:
        timed = {name: seconds[name][-options.rounds :] for name in pair}
        ratios = [a / b for a, b in zip(*timed.values(), strict=True)]
        print(f"{pair[0]} / {pair[1]}: median ratio {statistics.median(ratios):.3f} over {options.rounds} pairs")
        print(f"ratios {', '.join(f'{r:.3f}' for r in sorted(ratios))}; median seconds "
              f"{', '.join(f'{statistics.median(t):.2f}' for t in timed.values())}")  # fmt: skip
    if options.json:
        result = {"arguments": vars(options), "peak_bytes": peaks, "seconds": seconds, "torch": torch.__version__}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
