"""Time and memory of linear_log_probs and linear_kl_div on a CPU, beside all the logits, in pairs:

    python -m fastllm.bench.post_training [--tokens 8192] [--hidden 512] [--vocabulary 50304] [--rounds 3]

Each way runs forward and backward in this process, in fp32; its peak is what the process grows by, over the inputs and
with the gradients of the student. Rounds alternate the two of a pair; the ratio of a round is within that round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..functional import linear_kl_div, linear_log_probs
from .memory import peak
from .timing import ratios


def pairs(x, w, y, teacher) -> dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """Name -> (this library's loss, the same of all the logits)."""
    tx, tw = teacher

    def logs(x, w):
        return F.log_softmax(F.linear(x, w), -1)

    def jsd():
        log_q, log_p = logs(x, w), logs(tx, tw)
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        halves = (F.kl_div(log_m, each, reduction="batchmean", log_target=True) for each in (log_p, log_q))
        return sum(halves) / 2

    return {
        "linear_log_probs": (
            lambda: linear_log_probs(x, w, y).sum(),
            lambda: logs(x, w).gather(-1, y.unsqueeze(-1)).sum(),
        ),
        "linear_kl_div, forward": (
            lambda: linear_kl_div(x, w, tx, tw),
            lambda: F.kl_div(logs(x, w), logs(tx, tw), reduction="batchmean", log_target=True),
        ),
        "linear_kl_div, jsd": (lambda: linear_kl_div(x, w, tx, tw, direction="jsd"), jsd),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.bench.post_training", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    n, d, v = options.tokens, options.hidden, options.vocabulary
    torch.manual_seed(0)
    x, w = torch.randn(n, d).requires_grad_(), (torch.randn(v, d) / d**0.5).requires_grad_()
    y, teacher = torch.randint(v, (n,)), (torch.randn(n, d), torch.randn(v, d) / d**0.5)
    gradients = 4 * (x.numel() + w.numel())
    print(f"{n} x {d} x {v} fp32, {torch.get_num_threads()} threads; gradients {gradients / 1e6:.0f} MB")
    for name, ways in pairs(x, w, y, teacher).items():
        names, seconds, peaks = ("fastllm", "all the logits"), {}, {}

        def run(way):
            x.grad = w.grad = None
            start = time.perf_counter()
            way().backward()
            return time.perf_counter() - start

        for turn in range(options.rounds + 1):
            for label, way in list(zip(names, ways, strict=True))[:: 1 if turn % 2 else -1]:
                if turn:
                    seconds.setdefault(label, []).append(run(way))
                else:
                    x.grad = w.grad = None
                    peaks[label] = peak(lambda way=way: way().backward())
        beside = ", ".join(f"{label} {(peaks[label] - gradients) / 1e6:,.0f} MB" for label in names)
        print(f"{name}: peak beside the gradients: {beside}", flush=True)
        if options.rounds:
            speed = ratios(seconds, *names)
            print(f"  time over all the logits' {1 / speed.median:.2f}; seconds {seconds}", flush=True)


if __name__ == "__main__":
    main()
