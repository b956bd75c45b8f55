"""The example op of CONTRIBUTING.md, run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HAS_GPU

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
# Loads each block under the name of its file, then holds the op to the rule for numbers on every sample.
CHECK = """
import linecache, sys, types
import torch
sys.path.insert(0, {tests!r})
import conftest, contract
import fastllm, fastllm.bench, fastllm.kernels
blocks = {blocks!r}
for file, code in blocks.items():
    name = file.removesuffix(".py").replace("/", ".")
    name = name if name.startswith("fastllm.") else "fastllm." + name
    module = sys.modules[name] = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    path = {root!r} + "/" + file
    linecache.cache[path] = (len(code), None, code.splitlines(True), path)
    exec(compile(code, path, "exec"), module.__dict__)
op = fastllm.OPS["squared_relu"]
for backend in op.backends:
    for dtype in contract.DTYPES:
        for sample in op.samples(torch.device("cpu"), dtype):
            got = contract.run(op.function, contract.copy(sample), backend)
            stick = contract.run(op.reference, contract.copy(sample))
            truth = contract.run(op.reference, contract.copy(sample, torch.float64))
            for mine, yard, true in zip(sum(got, []), sum(stick, []), sum(truth, []), strict=True):
                contract.assert_as_true(mine, true, yard, dtype, sample.name)
assert set(sys.modules["fastllm.bench.squared_relu"].shapes)
print("samples agree")
"""


@pytest.mark.skipif(HAS_GPU, reason="the example runs in Triton's interpreter")
def test_the_example_op_runs_as_it_is_printed():
    text = PAGE.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^`(\S+\.py)`\n\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert list(blocks) == ["kernels/squared_relu.py", "fastllm/ops/squared_relu.py", "bench/squared_relu.py"]
    code = CHECK.format(tests=str(PAGE.parent / "tests"), root=str(PAGE.parent), blocks=blocks)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.stdout.split("\n")[-2:] == ["samples agree", ""], result.stderr
