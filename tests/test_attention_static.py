"""What ptxas makes of the attention kernels on sm_90: no spills, and warpgroup products in forward and backward."""

import json
import os
import re
import subprocess
import sys

from fastllm.bench.static import Resources

SHAPES = ("d64 causal", "d128 causal 2x16x8192", "decode")


def test_no_spills_and_warpgroup_products(tmp_path):
    file = tmp_path / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLLM_BACKEND")}
    # 3.9 warns while it is unset; 1 is what it and older versions do by default.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "fastllm.bench.static", "attention", "--arch", "90", "--json", str(file)]
    run = subprocess.run([*command, "--shape", *SHAPES], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = [(row["kernel"], row["direction"], Resources(**row["resources"])) for row in json.loads(file.read_text())]
    assert {direction for _, direction, _ in rows} == {"forward", "backward"}
    assert not [(kernel, r.registers, r.stack) for kernel, _, r in rows if r.spills]
    assert all(r.occupancy(90) > 0 for *_, r in rows)
    products = [r for kernel, _, r in rows if re.fullmatch("_attention_(fwd|bwd_dkdv|bwd_dq)_kernel", kernel)]
    assert len(products) == 6
    assert all(r.count("HGMMA") > 0 for r in products)
    # Of a split call: few rows, so warps' products and not a warpgroup's.
    splits = [r for kernel, _, r in rows if kernel == "_attention_split_kernel"]
    assert len(splits) == 2
    assert all(r.tensor_core > 0 for r in splits)
