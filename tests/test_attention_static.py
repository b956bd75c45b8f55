"""What ptxas makes of the attention kernels on sm_90: no spills, and warpgroup products in forward and backward."""

import json
import os
import subprocess
import sys

from fastllm.bench.static import Resources

SHAPES = ("d64 causal 2x32x8192", "d128 causal 2x16x8192", "decode")
PRODUCTS = {f"_attention_{name}_kernel" for name in ("fwd", "split", "bwd_dkdv", "bwd_dq")}


def test_no_spills_and_warpgroup_products(tmp_path):
    file = tmp_path / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLLM_BACKEND")}
    # 3.9 warns while it is unset; 1 is what it and older versions do by default.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "fastllm.bench.static", "attention", "--arch", "90", "--json", str(file)]
    run = subprocess.run([*command, "--shape", *SHAPES], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())
    rows = [(row["kernel"], row["direction"], Resources(**row["resources"])) for row in found]
    assert {direction for _, direction, _ in rows} == {"forward", "backward"}
    assert not [(kernel, r.registers, r.stack) for kernel, _, r in rows if r.spills]
    assert all(r.occupancy(90) > 0 for *_, r in rows)
    products = [(row["shape"], r) for row, (kernel, _, r) in zip(found, rows, strict=True) if kernel in PRODUCTS]
    # One query a sequence is too few rows for a warpgroup's products: each warp has its own.
    assert len([r for shape, r in products if "decode" not in shape and r.count("HGMMA") > 0]) == 6
    assert len([r for shape, r in products if "decode" in shape and r.count("HMMA") > 0]) == 4
