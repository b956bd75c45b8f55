"""What a device is said to be, from the properties that PyTorch's CUDA and ROCm builds give."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastllm.functional  # noqa: F401 - its ops
from fastllm import backends, extension
from fastllm.kernels import device
from fastllm.kernels.launch import cluster_blocks, processor_count, tuned
from fastllm.kernels.norm.backward import pipeline_stages
from fastllm.registry import OPS


def h100():
    return SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", gcnArchName="NVIDIA H100 80GB HBM3", major=9, minor=0,
        multi_processor_count=132, shared_memory_per_block_optin=232448,
    )  # fmt: skip


def mi300():
    # ROCm's build has no properties of shared memory before torch 2.8, and a capability of its own.
    return SimpleNamespace(
        name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4, multi_processor_count=304
    )


@pytest.mark.parametrize(
    ("properties", "vendor", "arch", "architecture", "shared"),
    [(h100, "nvidia", 90, "sm_90", 227 << 10), (mi300, "amd", 0, "gfx942", 64 << 10)],
)
def test_a_gpu_by_its_properties(monkeypatch, properties, vendor, arch, architecture, shared):
    found = device.from_properties(properties())
    assert (found.vendor, found.arch, found.architecture) == (vendor, arch, architecture)
    assert found.shared_per_block == shared
    monkeypatch.setattr(device, "_gpu", lambda index: found)
    cuda = torch.device("cuda", 0)
    assert device.device_info(cuda) is found
    assert processor_count(cuda) == properties().multi_processor_count
    # An MI300's capability of 9.4 is no sm_94: it has no clusters, and takes no entry of NVIDIA's.
    if vendor == "amd":
        assert cluster_blocks(cuda, 12288, 8192) == 0
        monkeypatch.setattr("fastllm.kernels.launch.TUNED", {("k", 94): {"n": 1}, ("k", "gfx942"): {"n": 2}})
        assert tuned("k", cuda, (), {"n": 0}) == {"n": 2}


def test_without_a_gpu_it_is_the_interpreter():
    assert device.device_info(torch.device("cpu")) is device.INTERPRETER
    assert device.INTERPRETER.architecture == "sm_90"


def test_the_current_gpu_is_meant_where_no_number_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(device, "_gpu", lambda index: index)
    assert device.device_info(torch.device("cuda")) == 3
    assert device.device_info(torch.device("cuda", 1)) == 1


def test_the_tensors_own_gpu_decides_and_not_the_current_one(monkeypatch):
    gpus = (device.GPUS[80], device.GPUS[90], device.OTHER_GPUS["sm_75"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "_gpu", gpus.__getitem__)
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(extension, "has_cuda", lambda: True)
    monkeypatch.setattr(extension, "gpu_obstacle", lambda arch: None if arch >= 80 else "no code for it")
    with FakeTensorMode():
        for index, hopper, lookup in ((0, False, "native"), (1, True, "native"), (2, False, "eager")):
            q = torch.empty(1, 1, 8, 64, dtype=torch.float16, device=f"cuda:{index}")
            assert (backends.why_not("hopper", "cuda", index=index) is None) == hopper
            with backends.backend("hopper"), nullcontext() if hopper else pytest.raises(backends.BackendError):
                backends.pick("attention", OPS["attention"].call(q, q, q))
            weight, ids = torch.empty(8, 8, device=q.device), torch.empty(4, dtype=torch.int64, device=q.device)
            with backends.untold():
                assert backends.pick("embedding", OPS["embedding"].call(ids, weight)).backend == lookup


def test_as_many_tiles_are_prefetched_as_shared_memory_holds(monkeypatch):
    """sm_90 has room for two of 96 KB beside the one that is in registers."""
    found = {}
    for gpu in (*device.GPUS.values(), *device.OTHER_GPUS.values()):
        monkeypatch.setattr(device, "_gpu", lambda index, gpu=gpu: gpu)
        found[gpu.architecture] = pipeline_stages(torch.device("cuda", 0), 96 << 10)
    assert {name for name, stages in found.items() if stages == 3} == {"sm_90", "sm_100"}
    assert (found["sm_80"], found["sm_86"], found["sm_75"]) == (2, 1, 1)
