"""The compiled extension ``fastllm._C``: compiling it (:mod:`.compile`) and loading it (:mod:`.load`)."""

from .load import (
    DIRECT,
    bf16_products,
    build_at_first_use,
    cache_folder,
    cpu_level,
    gpu_obstacle,
    has_cuda,
    has_matrix_units,
    missing,
    module,
    operator,
)

__all__ = [
    "DIRECT",
    "bf16_products",
    "build_at_first_use",
    "cache_folder",
    "cpu_level",
    "gpu_obstacle",
    "has_cuda",
    "has_matrix_units",
    "missing",
    "module",
    "operator",
]
