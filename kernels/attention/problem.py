"""One attention call as the launchers see it: sizes, strides and constants derived once."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..device import device_info
from ..launch import cdiv, launch_options, next_power_of_2, tuned
from ..math import LOG2E
from .values import CallSizes, KernelFlags, Plane, Programs, Score, ScoreStatistics, TileShape, WeightDropout


def bulk_copies(arch: int, dtype: torch.dtype) -> bool:
    """Whether the kernels bring a dense tensor's tiles by bulk copies (TMA): sm_90 and sm_100, for matrix units."""
    return 90 <= arch < 120 and dtype != torch.float32


class Problem:
    """One attention call as the launchers see it: what its kernels take, made once.

    ``call`` has the fields of the ops' AttentionCall: q, k and v, dense (B, H, S, D) or packed (total, H, D) with cu_q
    and cu_k; bias, sinks, slopes and seed, or None; scale; softcap, 0 for none; left and right, < 0 where unbounded
    and else below 2^30; bottom_right; dropout_p. The batch stride of a packed tensor is 0: cu_q and cu_k say where a
    sequence starts.
    """

    def __init__(self, call):
        q, k = call.q, call.k
        self.packed = call.cu_q is not None
        self.q, self.k, self.v = q, k, call.v
        self.bias, self.sinks = call.bias, call.sinks
        at = -2 if self.packed else 1
        self.heads, self.heads_kv = q.shape[at], k.shape[at]
        self.group = self.heads // max(self.heads_kv, 1)
        self.batch = call.cu_q.numel() - 1 if self.packed else q.shape[0]
        self.rows, self.cols = (q.shape[0], k.shape[0]) if self.packed else (q.shape[2], k.shape[2])
        self.dim, self.dim_v = q.shape[-1], self.v.shape[-1]
        self.bottom_right = call.bottom_right
        features = (call.bias, call.sinks, call.slopes)
        self.natural = call.softcap > 0 or any(x is not None for x in features) or not call.scale > 0
        self.score = self._score(call)
        self.dropout = None
        if call.dropout_p > 0:
            keep_scale = 1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1 else 0.0
            self.dropout = WeightDropout(call.seed, min(int(call.dropout_p * 2**32), 2**32 - 1), keep_scale)
        self.sizes = CallSizes(
            self.batch, self.heads, self.group, self.rows, self.cols, self.dim, self.dim_v, call.cu_q, call.cu_k
        )
        gpu = device_info(q.device)
        # torch.get_float32_matmul_precision() raises where torch.backends has chosen tf32 for cuBLAS alone.
        tf32 = gpu.has_tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.precision = "tf32" if tf32 else "ieee"
        # What the launch tables ask for: the architecture, the wider padded head dim, and the register pressure.
        self.arch = gpu.arch
        self.pressure = self._pressure()
        self.block_d, self.block_dv = max(16, next_power_of_2(self.dim)), max(16, next_power_of_2(self.dim_v))
        self.widest = max(self.block_d, self.block_dv)

    def _score(self, call) -> Score:
        features = {}
        if call.slopes is not None:
            batch = call.slopes.stride(0) if call.slopes.dim() == 2 else 0
            features |= dict(slopes=call.slopes, slopes_batch=batch, slopes_head=call.slopes.stride(-1))
        if call.bias is not None:
            bias = call.bias.view(torch.uint8) if call.bias.dtype == torch.bool else call.bias
            names = ("bias_batch", "bias_head", "bias_row", "bias_col")
            strides = (0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
            features |= dict(bias=bias, **dict(zip(names, strides, strict=True)))
        return Score(
            scale=call.scale,
            unit=LOG2E.value if self.natural else call.scale * LOG2E.value,
            softcap=call.softcap if call.softcap > 0 else None,
            left=call.left if call.left >= 0 else None,
            right=call.right if call.right >= 0 else None,
            **features,
        )

    def _pressure(self) -> int:
        """See :mod:`.tiles`."""
        if self.align() == 1:
            return 3
        if self.bias is not None or self.dropout is not None:
            return 2
        return min(sum(x is not None for x in (self.score.left, self.score.softcap, self.score.slopes)), 2)

    def strides(self, x):
        """(batch, head, row, column) strides of a tensor shaped like q, k, v or the output."""
        return (0, x.stride(1), x.stride(0), x.stride(2)) if self.packed else x.stride()

    def plane(self, x) -> Plane | None:
        """A tensor shaped like q, k, v or the output as kernels take it."""
        return None if x is None else Plane(x, *self.strides(x))

    def align(self, *tensors) -> int:
        """The ``align`` of a kernel that takes q, k, v and ``tensors``: elements in 16 bytes, or 1.

        Triton tells of a size or stride only whether 16 divides it. 16 does not divide head dims of 40, 72 or 120.
        """
        size = 16 // self.q.element_size()
        numbers = [self.dim, self.dim_v]
        for x in (self.q, self.k, self.v, *tensors):
            if x is not None:
                # A stride along a dimension of one is never used.
                numbers += [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        return 1 if any(n % size for n in numbers) else size

    def flags(self, *tensors) -> KernelFlags:
        """The constants of a kernel that takes q, k, v and ``tensors``."""
        wide = self.q.dtype == torch.float32
        return KernelFlags(
            natural=self.natural,
            mask=self.bias is not None and self.bias.dtype == torch.bool,
            bottom_right=self.bottom_right,
            exact=self.natural or wide,
            precision=self.precision if wide else "ieee",
            align=self.align(*tensors),
        )

    def statistics(self, stats, lse=None, delta=None) -> ScoreStatistics:
        """``stats`` is (2, B, H, Sq), packed (2, H, total): row maxima, and log2 of row sums."""
        batch = 0 if self.packed else self.heads * self.rows
        return ScoreStatistics(stats[0], stats[1], batch, self.rows, lse, delta)

    def descriptors(self, x, y, rows: int):
        """Descriptors of a tensor of q's width and one of v's that a kernel walks ``rows`` at a time, or (None, None).

        A bulk copy takes tensors whose address and strides are multiples of 16 bytes. Packed sequences are read by
        pointers: a copy would bring rows of the next sequence too, and a NaN there times a weight of 0 is NaN.
        """
        arch, dtype = self.arch if self.q.device.type == "cuda" else 0, self.q.dtype
        if self.packed or not bulk_copies(arch, dtype) or self.align(x, y) == 1:
            return None, None
        both = []
        for tensor, width in ((x, self.block_d), (y, self.block_dv)):
            # A dimension of one takes any stride. No copy takes the stride 0 of an expanded dimension.
            strides = [s if n > 1 else width for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
            if tensor.numel() == 0 or tensor.data_ptr() % 16 or tensor.stride(3) != 1 or min(strides[:3]) <= 0:
                return None, None
            both.append(TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], [1, 1, rows, width]))
        return both

    def programs(self, block: int, length: int) -> Programs:
        """How ``length`` is split in tiles of ``block``; packed: an upper bound, see :func:`.scores.locate`."""
        tiles = cdiv(length, block)
        if self.packed and self.batch > 0:
            return Programs(tiles, length // block + self.batch)
        # Without sequences cu_seqlens has one entry, and no program may look for the next.
        return Programs(tiles, tiles * self.batch)

    def tuned(self, kernel: str, tile: dict) -> dict:
        """``tile``, or what was measured to be faster for ``kernel``."""
        key = (self.widest, self.q.element_size(), self.pressure)
        return tuned(kernel, self.q.device, key, tile)

    def launch_of(self, kernel: str, tile: dict) -> tuple[TileShape, dict]:
        """The constants and the launch's options of ``kernel`` for ``tile``, from :mod:`.tiles`."""
        tile = self.tuned(kernel, tile)
        options = {name: value for name, value in tile.items() if name not in ("BLOCK_M", "BLOCK_N")}
        shape = TileShape(tile["BLOCK_M"], tile["BLOCK_N"], self.block_d, self.block_dv)
        return shape, launch_options(self.q.device, **options)

    def stats_shape(self):
        return (self.heads, self.rows) if self.packed else (self.batch, self.heads, self.rows)

    def new_statistics(self):
        """(lse, stats), uninitialised; of packed sequences they are those of rows that see nothing.

        No program writes the rows past the last sequence.
        """
        lse = self.q.new_empty(self.stats_shape(), dtype=torch.float32)
        stats = self.q.new_empty((2, *self.stats_shape()), dtype=torch.float32)
        if self.packed:
            lse.fill_(-torch.inf)
            stats[0].zero_()
            stats[1].fill_(torch.inf)
        return lse, stats
