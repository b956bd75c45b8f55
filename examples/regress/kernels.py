"""Triton kernels and the calls that guard them: ``fastllm bench regress examples/regress/kernels.py``.

Every function whose one argument is ``device`` is a call. It makes tensors of real sizes there and launches kernels.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n_cols + at, mask=at < n_cols, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / n_cols + eps)
    weight = tl.load(weight_ptr + at, mask=at < n_cols)
    tl.store(y_ptr + row * n_cols + at, x * scale * weight, mask=at < n_cols)


def rms_norm(device):
    x = torch.randn(8192, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.ones(4096, device=device, dtype=torch.bfloat16)
    rms_norm_kernel[(8192,)](x, weight, torch.empty_like(x), 4096, 1e-6, BLOCK=4096, num_warps=8)
