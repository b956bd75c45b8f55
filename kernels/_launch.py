"""What more than one launcher needs."""

import torch
import triton


def as_rows(x: torch.Tensor, n_cols: int) -> torch.Tensor:
    """``x`` as (rows, n_cols) whose columns are adjacent in memory; copies only where no such view exists."""
    x = x.reshape(-1, n_cols)
    return x if x.stride(1) == 1 or n_cols == 1 else x.contiguous()


def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter 4, so that persistent loops take several turns there too."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(int(n), 1))
