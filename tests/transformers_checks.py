"""What transformers' own model tests assert, with and without fastllm: ``python tests/transformers_checks.py``.

transformers' wheel carries no tests, so these are the same assertions written again. Each check is run on a tiny random
model as it is and on its copy that is accelerated (``tests/architectures.py`` has the models). Both must give the same
values, or raise the same error. What differs is printed, one line each, and the exit status is 1 where a difference is
not among :data:`KNOWN`. Arguments are names of architectures; by default those of :data:`NAMES`.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable

import torch
from architectures import ARCHITECTURES, build, there
from torch.utils import _pytree as pytree
from transformers_assertions import CHECKS

import fastllm

NAMES = (
    "llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "opt", "bloom", "mixtral", "gpt_oss", "deepseek_v3", "bert",
    "modernbert", "t5_gated", "bart", "whisper", "vit", "clip",
)  # fmt: skip
# (check, architecture or "*") -> why the difference is meant.
KNOWN: dict[tuple[str, str], str] = {}


def outcome(function: Callable, model, inputs):
    """What ``function`` returns, or the error that it raises, as a string."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            return function(model, inputs)
        except Exception as error:  # what is asked is whether both raise the same
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def difference(got, expected) -> str | None:
    """How two outcomes differ, or None."""
    if isinstance(got, str) or isinstance(expected, str):
        return None if got == expected else f"{got!s:.200} instead of {expected!s:.200}"
    (a, tree), (b, other) = (pytree.tree_flatten(x) for x in (got, expected))
    if tree != other:
        return f"structure {tree!s:.200} instead of {other!s:.200}"
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if type(x) is not type(y) or x != y:
                return f"{x!s:.100} instead of {y!s:.100}"
        elif x.shape != y.shape or x.dtype != y.dtype:
            return f"{x.dtype} {tuple(x.shape)} instead of {y.dtype} {tuple(y.shape)}"
        else:
            x, y, near = x.double(), y.double(), 3e-2 if x.dtype in (torch.bfloat16, torch.float16) else 2e-4
            largest = y.abs().max().item() if y.numel() else 0.0
            if not torch.allclose(x, y, rtol=near, atol=near * (1e-3 + largest)):
                return f"values differ by {(x - y).abs().max():.2g} of {largest:.2g}"
    return None


def main(names: list[str]) -> int:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    ran = raised = unknown = 0
    for name in names or [name for name in NAMES if there(name)]:
        if not fastllm.accelerate(build(name)[0], dry_run=True).swapped:
            raise SystemExit(f"{name}: accelerate() swaps nothing, so there is nothing to compare")
        for title, function in CHECKS.items():
            results = []
            for accelerated in (True, False):
                each, given = build(name)
                if accelerated:
                    fastllm.accelerate(each)
                results.append(outcome(function, each, given))
            ran += 1
            raised += isinstance(results[1], str)
            what = difference(*results)
            if what is None:
                continue
            why = KNOWN.get((title, name), KNOWN.get((title, "*")))
            unknown += why is None
            print(f"{name}: {title}: {what}" + ("" if why is None else f" (known: {why})"), flush=True)
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}: {ran} pairs, of which {raised} raise "
        f"the same error in both; {unknown} unknown differences"
    )
    return int(unknown > 0)


if __name__ == "__main__":
    if unknown := [name for name in sys.argv[1:] if name not in ARCHITECTURES]:
        raise SystemExit(f"no such architectures: {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    sys.exit(main(sys.argv[1:]))
