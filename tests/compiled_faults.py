"""Run where kernels compile: prints as JSON what ptxas made of kernels with a fault each, for test_static.py."""

import json

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fastllm import OPS
from fastllm.bench import static
from fastllm.bench.budget import Budget
from fastllm.bench.capture import pretend
from fastllm.bench.sass import read_resources
from fastllm.kernels.device import GPUS
from fastllm.kernels.norm import forward
from fastllm.kernels.norm.arguments import NormInputs, NormNumbers, NormOutputs, NormPlaces


@triton.jit
def scale(x_ptr, y_ptr, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * factor)


@triton.jit
def scale_rows(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    at = row * n + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + row.to(tl.int64) * n + tl.arange(0, BLOCK)))


@triton.jit
def scale_in_double(x_ptr, y_ptr, factor: tl.float64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * factor)


def too_large_a_block() -> dict:
    """A norm whose tile is a whole row, and what is left out where there is no time."""
    usual, forward.FWD_ROW = forward.FWD_ROW, 65536
    rows = list(static.rows([OPS["layer_norm"]], [90], shapes=["32768x65536"]))
    forward.FWD_ROW = usual
    budget = Budget(0.0)
    compiled = list(static.rows([OPS["layer_norm"]], [90], shapes=["one token"], budget=budget))
    return {
        "spills": max(row.resources.spills for row in rows),
        "problems": [problem for row in rows for problem in static.problems(row)],
        "compiled_without_time": len(compiled),
        "left_out": budget.left_out,
    }


def creeping_in() -> dict:
    """fp64 instructions and products of 32 bits, by kernel."""
    found = {}
    with pretend(GPUS[90], lambda name, grid, compiled: found.update({name: read_resources(compiled)})):
        x = torch.empty(1024, device="cuda")
        scale[(1,)](x, x, 0.5, BLOCK=1024)
        scale_in_double[(1,)](x, x, 0.5, BLOCK=1024)
        scale_rows[(1,)](x, x, 77, BLOCK=1024)
    return {name: {"doubles": r.doubles, "narrow_products": r.narrow_products} for name, r in found.items()}


def python_float(eps: str) -> int:
    """fp64 instructions of the norm for the type of ``eps``: under torch.compile a Python float can come as fp64."""
    kernel, absent = forward._norm_fwd_kernel, "constexpr"
    arguments = {
        "inputs": NormInputs("*bf16", absent, "*bf16", absent, absent),
        "outputs": NormOutputs("*bf16", "*bf16", "*fp32", "*fp32"),
        "places": NormPlaces(("i32",) * 3, ("i32",) * 3),
        "n_rows": "i32",
        "n_cols": "i32",
        "numbers": NormNumbers(eps, "fp32", "fp32"),
    }
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(0, 1): None, (0, 3): None, (0, 4): None, "CENTER": True, "BLOCK_M": 1, "BLOCK_N": 1024}
    return read_resources(compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32))).doubles


def host_sync() -> dict:
    """What reading a value back from a device that is not there raises, and how its addresses are aligned."""
    with pretend(GPUS[90], print):
        x = torch.ones(4, device="cuda")
        told = {"device": x.device.type, "address": x[1:].data_ptr() % 16, "error": None}
        try:
            x.sum().item()
        except (RuntimeError, NotImplementedError) as error:
            told["error"] = type(error).__name__
    return told


if __name__ == "__main__":
    found = {
        "too_large_a_block": too_large_a_block(),
        "creeping_in": creeping_in(),
        "python_float": {eps: python_float(eps) for eps in ("fp32", "fp64")},
        "host_sync": host_sync(),
    }
    print(json.dumps(found))
