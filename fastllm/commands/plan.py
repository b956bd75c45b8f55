"""Memory per GPU, communication and time of a training step, on paper, from stated rates."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import partial

from ..config import InputError
from ..models.config import MAX_SIZE, PRESETS
from ..training.parallel.planner import EFFICIENCY, GIB, GPU, GPUS, OVERLAP, Plan, TooLarge, plan, shape_of

# The largest number that is taken. A guess.
MAX_NUMBER = 1e18
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def _number(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.lower())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a number above 0 such as 70b or 4m, got {text!r}")
    value = float(match[1]) * _UNITS[match[2]]
    if value > MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_NUMBER:g}, got {text[:40]}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--params", type=_number, metavar="N", help="a Llama-shaped decoder of about N parameters, e.g. 70b"
    )
    shape.add_argument("--preset", choices=list(PRESETS), help="a model's shape by name (default: gpt2)")
    parser.add_argument("--context-length", type=int, metavar="N", help="(default: the model's)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpu", choices=list(GPUS), default="h200", help="whose data sheet (default: %(default)s)")
    for name, text in (
        ("memory", "GB of memory"),
        ("flops", "TFLOP/s, dense, in bf16"),
        ("within", "GB/s to GPUs of the same node"),
        ("between", "GB/s to other nodes"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=f"{text}, instead of the data sheet's")
    parser.add_argument(
        "--batch-tokens", type=_number, metavar="N", help="of a step (default: 4m, at least one context)"
    )
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="(default: the largest that fits)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp", help="(default: %(default)s)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--checkpoint-activations", action="store_true", help="keep only each block's input")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        metavar="X",
        help="share of the peak that is reached (default: %(default)s)",
    )
    parser.add_argument(
        "--overlap", type=float, default=OVERLAP, metavar="X",
        help="share of the compute time that can hide communication (default: %(default)s)",
    )  # fmt: skip


def _gpu(arguments: argparse.Namespace) -> GPU:
    """The GPU's data sheet with the rates that are given in its place.

    Raises:
        InputError: a rate is out of range.
    """
    units = {"memory": 1e9, "flops": 1e12, "within": 1e9, "between": 1e9}
    given = {name: getattr(arguments, name) for name in units if getattr(arguments, name) is not None}
    for name, value in given.items():
        if not 0 < value <= MAX_NUMBER:
            raise InputError(f"--{name}: expected more than 0 and at most {MAX_NUMBER:g}, got {value}")
    return replace(GPUS[arguments.gpu], **{name: value * units[name] for name, value in given.items()})


def _check(arguments: argparse.Namespace) -> None:
    for name in ("gpus", "gpus_per_node", "context_length", "micro_batch_size"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MAX_SIZE:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1 and at most {MAX_SIZE}, got {value}")
    if not 0 < arguments.efficiency <= 1:
        raise InputError(f"--efficiency: expected more than 0 and at most 1, got {arguments.efficiency}")
    if not 0 <= arguments.overlap <= 1:
        raise InputError(f"--overlap: expected at least 0 and at most 1, got {arguments.overlap}")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    gpu = _gpu(arguments)
    model = shape_of(arguments.params) if arguments.params else PRESETS[arguments.preset or "gpt2"]
    if arguments.context_length is not None:
        model = model.replace(context_length=arguments.context_length)
    context_of_all = model.context_length * arguments.gpus
    tokens = max(1, int(arguments.batch_tokens or max(4e6, context_of_all)) // context_of_all) * context_of_all
    planned = partial(
        plan, model, arguments.gpus, gpu, batch_tokens=tokens, parallel=arguments.parallel,
        optimizer=arguments.optimizer, dtype=arguments.dtype, gpus_per_node=arguments.gpus_per_node,
        efficiency=arguments.efficiency, overlap=arguments.overlap, micro_batch=arguments.micro_batch_size,
    )  # fmt: skip
    try:
        result = planned(checkpoint_activations=arguments.checkpoint_activations)
    except TooLarge:
        if arguments.checkpoint_activations:
            raise
        result = planned(checkpoint_activations=True)
        print("with --checkpoint-activations: without, not even one sequence fits")
    _show(result, arguments, gpu, tokens)
    return 0


def _show(result: Plan, arguments: argparse.Namespace, gpu: GPU, tokens: int) -> None:
    """Prints the plan of a step of ``tokens`` tokens."""
    shape = result.model
    print(
        f"model: {result.parameters / 1e9:.2f}B parameters, {shape.num_layers} layers of {shape.hidden_size}, "
        f"{shape.num_heads} heads ({shape.kv_heads} of keys), vocabulary {shape.vocab_size:,}, "
        f"context {shape.context_length:,}"
    )
    print(
        f"{result.gpus:,} x {arguments.gpu}, {arguments.parallel}, {tokens:,} tokens a step: {result.micro_steps} x "
        f"{result.micro_batch} sequences on each GPU (at most {result.largest_micro_batch} at once)"
    )
    print("memory of a GPU, GiB:")
    for name, size in result.memory.items():
        print(f"  {name:<28}{size / GIB:10.2f}")
    print(f"  {'sum':<28}{sum(result.memory.values()) / GIB:10.2f}  of {result.limit / GIB:.1f}")
    print("sent by a GPU in a step, GB:")
    for name, size in result.sent.items():
        print(f"  {name:<28}{size / 1e9:10.2f}")
    print(
        f"a step: {result.step_seconds:.3f} s = {result.compute_seconds:.3f} s of compute at "
        f"{arguments.efficiency:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s + {result.exposed_seconds:.3f} s of "
        f"{result.communication_seconds:.3f} s of communication, the rest is hidden behind compute"
    )
    print(f"{result.tokens_per_second(tokens):,.0f} tokens/s, expected MFU {result.mfu:.1%}")
