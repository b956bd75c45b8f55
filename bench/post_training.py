"""Time and memory of linear_log_probs and linear_kl_div on a CPU, in pairs with other ways to the same:

    python -m fastllm.bench.post_training [--tokens 8192] [--hidden-size 512] [--vocab-size 50304] [--rounds 3]
        [--only NAME ...]

The other ways are all the logits, beside 64 MiB of workspace and beside one that holds all of them too; the logits of
as many rows as this library takes at a time, checkpointed, which is plain PyTorch at equal memory; and, where
liger-kernel is installed, its chunked GRPO loss, a sequence of 256 tokens at a time. Each way runs forward and
backward in this process, in fp32; its peak is what the process grows by, over the inputs and with the gradients of the
student. Rounds alternate the two of a pair; the ratio of a round is within that round, of the process's CPU seconds,
which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .. import losses
from ..functional import linear_cross_entropy_plan, linear_kl_div, linear_log_probs
from ..parser import first_paragraph
from .memory import peak
from .timing import interleaved, ratios

LENGTH = 256  # tokens of a sequence of the GRPO loss
WORKSPACE_MB = 64


def _in_checkpointed_chunks(x, w, y):
    def own(x, y):
        return F.log_softmax(F.linear(x, w), -1).gather(-1, y.unsqueeze(-1)).sum()

    rows = linear_cross_entropy_plan(x, w, reduction="none", max_workspace_mb=WORKSPACE_MB).rows
    chunks = zip(x.split(rows), y.split(rows), strict=True)
    return torch.stack([checkpoint(own, *some, use_reentrant=False) for some in chunks]).sum()


def _beside_liger(x, w, y):
    """(this library's loss, Liger's) of GRPO with DAPO's mean, or None without Liger or with a part of a sequence."""
    try:
        liger = import_module("liger_kernel.chunked_loss")
    except ModuleNotFoundError:
        return None
    if len(x) % LENGTH:
        return None
    gain, mask = torch.randn(len(x) // LENGTH), torch.ones(len(x) // LENGTH, LENGTH)
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, epsilon_high=0.28)
    return (
        lambda: losses.dapo(linear_log_probs(x, w, y, max_workspace_mb=WORKSPACE_MB).view_as(mask), None, gain, mask),
        lambda: loss(x.view(*mask.shape, -1), w, y.view_as(mask), mask, gain)[0],
    )


def pairs(x, w, y, teacher) -> dict[str, tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """Name -> (the other way's name, this library's loss, the other's)."""
    tx, tw = teacher

    def logs(x, w):
        return F.log_softmax(F.linear(x, w), -1)

    def jsd():
        log_q, log_p = logs(x, w), logs(tx, tw)
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        halves = [F.kl_div(log_m, each, reduction="batchmean", log_target=True) for each in (log_p, log_q)]
        return torch.stack(halves).sum() / 2

    liger = _beside_liger(x, w, y)
    return {
        "linear_log_probs": (
            "all the logits",
            lambda: linear_log_probs(x, w, y, max_workspace_mb=WORKSPACE_MB).sum(),
            lambda: logs(x, w).gather(-1, y.unsqueeze(-1)).sum(),
        ),
        "linear_log_probs in one chunk": (
            "all the logits",
            lambda: linear_log_probs(x, w, y, max_workspace_mb=len(x) * len(w) * 4 / 2**20 + 1).sum(),
            lambda: logs(x, w).gather(-1, y.unsqueeze(-1)).sum(),
        ),
        "linear_log_probs at equal memory": (
            "checkpointed chunks",
            lambda: linear_log_probs(x, w, y, max_workspace_mb=WORKSPACE_MB).sum(),
            lambda: _in_checkpointed_chunks(x, w, y),
        ),
        **({} if liger is None else {"grpo": ("Liger", *liger)}),
        "linear_kl_div, forward": (
            "all the logits",
            lambda: linear_kl_div(x, w, tx, tw),
            lambda: F.kl_div(logs(x, w), logs(tx, tw), reduction="batchmean", log_target=True),
        ),
        "linear_kl_div, jsd": ("all the logits", lambda: linear_kl_div(x, w, tx, tw, direction="jsd"), jsd),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.post_training", description=first_paragraph(__doc__))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the pairs, such as grpo")
    options = parser.parse_args(argv)
    n, d, v = options.tokens, options.hidden_size, options.vocab_size
    torch.manual_seed(0)
    x, w = torch.randn(n, d).requires_grad_(), (torch.randn(v, d) / d**0.5).requires_grad_()
    y, teacher = torch.randint(v, (n,)), (torch.randn(n, d), torch.randn(v, d) / d**0.5)
    gradients = 4 * (x.numel() + w.numel())
    print(f"{n} x {d} x {v} fp32, {torch.get_num_threads()} threads; gradients {gradients / 1e6:.0f} MB")
    for name, (other, *ways) in pairs(x, w, y, teacher).items():
        if options.only and name not in options.only:
            continue
        pair = dict(zip(("fastllm", other), ways, strict=True))

        def timed(way, _):
            x.grad = w.grad = None
            start = time.process_time()
            way().backward()
            return time.process_time() - start

        peaks = {}
        for label, way in pair.items():
            x.grad = w.grad = None
            peaks[label] = peak(lambda way=way: way().backward())
        beside = ", ".join(f"{label} {(peaks[label] - gradients) / 1e6:,.0f} MB" for label in pair)
        print(f"{name}: peak beside the gradients: {beside}", flush=True)
        if options.rounds:
            seconds = interleaved(pair, options.rounds, x.device, warmup=0, timer=timed)
            speed = ratios(seconds, *pair)
            print(f"  time over {other}: {1 / speed.median:.2f}; seconds {seconds}", flush=True)


if __name__ == "__main__":
    main()
