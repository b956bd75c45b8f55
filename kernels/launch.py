"""What more than one launcher needs."""

import torch
import triton

from .tuned import TUNED

# Options of every launch. a * b + c is rounded once, whatever Triton's version or the environment has as its default.
OPTIONS = {"enable_fp_fusion": True}


def as_rows(x: torch.Tensor, n_cols: int) -> torch.Tensor:
    """``x`` as (rows, n_cols) whose columns are adjacent in memory; copies only where no such view exists."""
    x = x.reshape(-1, n_cols)
    return x if x.stride(1) == 1 or n_cols == 1 else x.contiguous()


def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter 4, so that persistent loops take several turns there too."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(kernel: str, device: torch.device, key: tuple, settings: dict[str, int]) -> dict[str, int]:
    """``settings``, or what was measured to be faster where ``kernel`` decides by ``key`` on such a GPU."""
    arch = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    return TUNED.get((kernel, arch, *key), settings)


# A reduction across a cluster's blocks does not compile before.
_REDUCES_ACROSS_CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def cluster_blocks(device: torch.device, n_cols: int, most: int) -> int:
    """How many blocks of a cluster share a row of which one holds ``most`` columns; 0 where no cluster can.

    Clusters are of sm_90 and later, and 8 blocks the most that every such GPU grants. The interpreter is as sm_90.
    """
    if device.type == "cuda" and not (_REDUCES_ACROSS_CLUSTERS and torch.cuda.get_device_capability(device)[0] >= 9):
        return 0
    blocks = next_power_of_2(triton.cdiv(n_cols, max(most, 1)))
    return blocks if blocks <= 8 else 0


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(int(n), 1))


class RowView:
    """``x`` as rows of ``n_cols`` adjacent elements at up to two strides; copied only where no such view exists.

    Row i starts at ``(i // inner) * strides[0] + (i % inner) * strides[1]``: the heads of a packed query-key-value
    projection, for example, are read where they lie.
    """

    def __init__(self, x: torch.Tensor, n_cols: int):
        lead, strides = list(x.shape[:-1]), list(x.stride()[:-1])
        dims: list[tuple[int, int]] = []
        for size, stride in zip(reversed(lead), reversed(strides), strict=True):
            if dims and stride == dims[-1][0] * dims[-1][1]:
                dims[-1] = (dims[-1][0] * size, dims[-1][1])
            elif size != 1:
                dims.append((size, stride))
        if len(dims) > 2 or (x.stride(-1) != 1 and n_cols != 1):
            x, dims = x.contiguous(), []
        count = x.numel() // n_cols
        if not dims:
            dims = [(max(count, 1), n_cols)]
        self.data = x
        self.count = count
        # An inner of 1 is a constant to the compiler, and spares a 64-bit division a row where one stride says it all.
        self.inner = dims[0][0] if len(dims) == 2 else 1
        self.strides = (dims[1][1], dims[0][1]) if len(dims) == 2 else (dims[0][1], 0)

    @property
    def layout(self) -> tuple[int, int, int]:
        """What a kernel needs to address them."""
        return self.inner, *self.strides
