"""What launchers share: options, rounding, and tensors seen as rows."""

import ast
import itertools
from pathlib import Path

import pytest
import torch

from fastllm import kernels
from fastllm.kernels.attention.tiles import dbias_tile, dkdv_tile, dq_tile, forward_tile
from fastllm.kernels.launch import RowView, cdiv, cluster_blocks, launch_options, next_power_of_2


def test_what_a_launch_chooses_is_made_once():
    cpu = torch.device("cpu")
    assert launch_options(cpu, num_warps=4, maxnreg=64) is launch_options(cpu, num_warps=4, maxnreg=64)
    assert launch_options(cpu, num_warps=4) == {"enable_fp_fusion": True, "num_warps": 4}
    assert [next_power_of_2(n) for n in (-1, 0, 1, 2, 3, 65536, 65537)] == [1, 1, 1, 2, 4, 65536, 131072]
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_every_gpu_with_clusters_grants_eight_blocks():
    cpu = torch.device("cpu")
    columns = (4097, 2 * 4096, 8 * 4096, 8 * 4096 + 1)
    assert [cluster_blocks(cpu, n, 4096) for n in columns] == [2, 2, 8, 0]


def test_a_gpu_takes_the_tiles_of_those_with_its_matrix_instructions_and_shared_memory():
    """sm_120 has neither sm_100's instructions nor its shared memory: 113 KB of a tile do not fit in 99."""
    like = {0: 80, 75: 80, 80: 80, 86: 80, 87: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 80, 121: 80}
    for arch, kind in like.items():
        for of in (forward_tile, dkdv_tile, dq_tile):
            for dim, pressure in itertools.product((64, 128, 256), range(4)):
                assert of(dim, torch.bfloat16, arch, pressure) == of(dim, torch.bfloat16, kind, pressure), (of, arch)
        assert dbias_tile(torch.bfloat16, arch) == dbias_tile(torch.bfloat16, kind)


def test_launchers_round_by_plain_integers():
    """Triton's own cdiv and next_power_of_2 are for kernels' constants: a call takes 2 us of a launch's host time."""
    for path in Path(kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            slow = isinstance(node, ast.Attribute) and node.attr in ("cdiv", "next_power_of_2")
            assert not (slow and isinstance(node.value, ast.Name) and node.value.id == "triton"), (path, node.lineno)


@pytest.mark.parametrize("shape", [(3, 4, 8), (1, 1, 8), (5, 8)])
def test_rows_without_gaps_are_seen_at_once(shape):
    """As the walk over dimensions finds them, which a stride of the first dimension asks for."""
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    padded = torch.zeros(*shape[:-1], 12)[..., :8].copy_(x)
    for view in (RowView(x, 8), RowView(padded, 8)):
        inner, outer_stride, inner_stride = view.layout
        starts = [(i // inner) * outer_stride + (i % inner) * inner_stride for i in range(view.count)]
        assert torch.equal(torch.stack([view.data.as_strided((8,), (1,), at) for at in starts]), x.view(-1, 8))
