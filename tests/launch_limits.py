"""Every launch of the ops' samples, with dropout too, by Triton's own binder, held to what a pretended GPU can launch.

    python tests/launch_limits.py STEP GPU...

takes each STEP-th sample, forward and backward: threads, the registers that a launch bounds, the sides of the grid,
options that the GPU's compiler does not know, boxes of bulk copies. For sm_90 each kernel goes through Triton's front
end too, which refuses what this version of Triton lacks. Prints how many launches there were, and a line for each
that breaks a limit. What is known of a kernel only when it is compiled, shared memory and spills, bench/other_gpus.py
and bench/static.py look at.
"""

import inspect
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from triton._C.libtriton import ir
from triton.runtime.jit import JITFunction

from fastllm.backends import backend
from fastllm.bench import cases
from fastllm.bench.capture import pretend
from fastllm.bench.limits import EVERY_GPU, Footprint, over_limits
from fastllm.registry import OPS

# Elements along a side of the box that a bulk copy brings.
BOX = 256


def _like(t):
    """``t`` on the pretended GPU, with its strides and its offset, and no values."""
    base = torch.empty(max(1, t.untyped_storage().nbytes() // t.element_size()), dtype=t.dtype, device="cuda")
    return base.as_strided(t.shape, t.stride(), t.storage_offset()).detach().requires_grad_(t.requires_grad)


def wrong(gpu, options, grid, descriptors):
    """Why ``gpu`` would refuse a launch with these options, grid and boxes of bulk copies."""
    registers = getattr(options, "maxnreg", None) or 0
    found = over_limits(Footprint(tuple(grid), options.num_warps * gpu.lanes, registers), gpu)
    if 0 in grid:
        found.append(f"an empty grid of {grid}")
    if descriptors and not (gpu.vendor == "nvidia" and gpu.arch >= 90):
        found.append("bulk copies")
    return found + [f"a box of {box}" for box in descriptors if max(box) > BOX]


def _refusal(kernel, device, signature, constexprs, attrs, options):
    """What Triton's front end says of the kernel's source, in a list; empty where it takes it."""
    _, _, target, compiler, _ = kernel.device_caches[device]
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    source = kernel.ASTSource(kernel, signature, constexprs, attrs)
    generators, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
    try:
        source.make_ir(target, options, generators, modules, context)
    except Exception as error:  # whatever it is: the last one of the chain says it
        while error.__cause__ is not None:
            error = error.__cause__
        return [f"{type(error).__name__}: {str(error).splitlines()[-1]}"]
    return []


def launches_of(gpu, step):
    """(kernel, sample, what is wrong) of every launch."""
    found, current = [], {}

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        boxes = [text for text in map(str, signature.values()) if "tensordesc" in text]
        refused = _refusal(self, device, signature, constexprs, attrs, options) if gpu.arch == 90 else []
        made = SimpleNamespace(options=options, boxes=[_box(text) for text in boxes], refused=refused)
        self.device_caches[device][0][key] = made
        return made

    def on_launch(kernel, grid, made):
        found.append((kernel, current["sample"], made.refused + wrong(gpu, made.options, grid, made.boxes)))

    dtypes = (torch.float32, torch.bfloat16 if gpu.has_bfloat16 else torch.float16)
    for op in OPS.values():
        if "triton" not in op.backends or (gpu.product_obstacle and "attention" in op.name):
            continue
        for dtype in dtypes:
            samples = list(op.samples(torch.device("cpu"), dtype))[::step]
            with mock.patch.object(JITFunction, "_do_compile", do_compile), pretend(gpu, on_launch), backend("triton"):
                for sample in (*samples, *_dropped(op, samples)):
                    current["sample"] = f"{op.name}/{sample.name}"
                    args, kwargs = torch.utils._pytree.tree_map_only(
                        torch.Tensor, _like, (sample.args, dict(sample.kwargs))
                    )
                    sample = type(sample)(sample.name, args, kwargs)
                    outs = list(cases.forward(op.function, sample))
                    leaves = cases.differentiable(sample)
                    if leaves and any(y.requires_grad for y in outs):
                        cases.backward(outs, leaves, [torch.empty_like(y) for y in outs])
    return found


def _dropped(op, samples):
    """The samples with dropout, which they leave out since what it drops is random."""
    if "dropout_p" in inspect.signature(op.function).parameters:
        for sample in samples:
            yield type(sample)(f"{sample.name}, dropout", sample.args, {**sample.kwargs, "dropout_p": 0.1})


def _box(text):
    """The box of ``tensordesc<bf16[1, 1, 64, 128]>``."""
    inside = text.partition("[")[2].partition("]")[0]
    return [int(n) for n in inside.split(",") if n.strip().isdigit()]


def main():
    step = int(sys.argv[1])
    for name in sys.argv[2:]:
        found = launches_of(EVERY_GPU[name], step)
        print(name, len(found), "launches")
        for kernel, sample, problems in found:
            for problem in problems:
                print("WRONG", name, sample, kernel, problem)


if __name__ == "__main__":
    main()
