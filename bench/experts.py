"""Mixtures of experts of transformers before and after accelerate(), in turns:

    python -m fastllm.bench.experts [--dtype float32 bfloat16] [--rounds 7]

Prints the medians of forward and backward in milliseconds, on the CPU with the threads that torch has.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

import fastllm

from ..parser import first_paragraph
from .timing import interleaved

# Experts, experts for each token, tokens, hidden size, inner size.
SHAPES = ((8, 2, 1024, 512, 1024), (64, 8, 512, 256, 256), (64, 8, 1, 512, 512))


def forward_and_backward(module, x, numbers, weights) -> tuple[float, float]:
    """Seconds of either."""
    start = time.perf_counter()
    y = module(x, numbers, weights)
    middle = time.perf_counter()
    y.float().square().sum().backward()
    return middle - start, time.perf_counter() - middle


def compare(cls, config, implementation: str, dtype: torch.dtype, shape: tuple[int, ...], rounds: int) -> str:
    experts, each, tokens, hidden, inner = shape
    given = config(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=each
    )  # fmt: skip
    given._experts_implementation = implementation
    torch.manual_seed(0)
    before = cls(given).to(dtype)
    for parameter in before.parameters():
        parameter.data.normal_(0, 0.05)
    after = copy.deepcopy(before)
    if not fastllm.accelerate(after).swapped:
        raise SystemExit(f"{cls.__name__} is not accelerated")
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    numbers = torch.rand(tokens, experts).topk(each).indices
    weights = torch.rand(tokens, each, requires_grad=True)
    sides = {"before": before, "after": after}
    times = interleaved(
        sides, rounds, torch.device("cpu"), timer=lambda module, _: forward_and_backward(module, x, numbers, weights)
    )
    forward, backward = (
        " -> ".join(f"{1e3 * statistics.median(t[i] for t in times[name]):8.2f}" for name in sides) for i in (0, 1)
    )
    return f"{cls.__name__:15} {implementation:10} {str(dtype)[6:]:9} {shape!s:26} {forward}   {backward}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.experts", description=first_paragraph(__doc__))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="of forward and backward, after one that does not count")
    arguments = parser.parse_args(argv)
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print("experts, of a token, tokens, hidden, inner; forward before -> after, backward before -> after, ms")
    for implementation in ("grouped_mm", "eager"):
        for dtype in (getattr(torch, name) for name in arguments.dtype):
            for cls, config in (
                (MixtralExperts, transformers.MixtralConfig), (GptOssExperts, transformers.GptOssConfig)
            ):  # fmt: skip
                for shape in SHAPES:
                    print(compare(cls, config, implementation, dtype, shape, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
