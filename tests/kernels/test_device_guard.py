"""A launch goes to the GPU that its tensors are on, and to torch's stream there, whichever GPU is the current one."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastllm  # noqa: F401 - its operators
from fastllm.registry import LAUNCHERS

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
# A value of each type that an operator's schema names; tensors are apart.
VALUES = {"int": 1, "float": 1.0, "number": 1.0, "bool": False, "str": "", "ScalarType": torch.float32}


class _Entered(Exception):
    """In the place of torch.cuda.device: says which device is made the current one, and ends the call there."""

    def __enter__(self):
        raise self

    def __exit__(self, *_):
        return False


def _value(kind, tensor):
    kind = str(kind)
    if kind.startswith("Optional"):
        return None
    if kind.startswith("List"):
        return [tensor] if "Tensor" in kind else []
    return tensor if kind == "Tensor" else VALUES[kind]


def test_every_launcher_makes_its_tensors_gpu_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", _Entered)
    with FakeTensorMode():
        tensor = torch.empty(4, 4, device="cuda:1")
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    assert len(LAUNCHERS) > 15
    for name in LAUNCHERS:
        operator = getattr(torch.ops.fastllm, name).default
        arguments = [_value(argument.type, tensor) for argument in operator._schema.arguments]
        with pytest.raises(_Entered) as entered:
            operator.redispatch(on_cuda, *arguments)
        assert entered.value.args == (torch.device("cuda", 1),), name


def test_every_launch_of_the_extension_is_on_torchs_stream():
    sources = {file.name: file.read_text(encoding="utf-8") for file in sorted(CSRC.glob("*.cu"))}
    launches = [(name, call) for name, text in sources.items() for call in re.findall(r"<<<([^>]*)>>>", text)]
    assert len(launches) > 10
    assert [call for call in launches if not re.search(r", (?:device\.stream\(\)|stream)$", call[1])] == []
    # What calls them has an OnDevice, which makes the tensor's GPU the current one, or is given its stream.
    for name, text in sources.items():
        functions = re.split(r"\n(?=\S[^\n]*\()", text)
        for function in functions:
            if "<<<" in function:
                assert "OnDevice device(" in function or "cudaStream_t stream" in function, (name, function[:80])
