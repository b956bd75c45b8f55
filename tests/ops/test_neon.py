"""The vector code of csrc/cpu as an ARM processor runs it: the bytes that x86 without AVX gives, in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest
from thorough import IS_THOROUGH

ROOT = Path(__file__).resolve().parents[2]
# As fastllm/extension/compile/ compiles it for a processor without variants.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-trapping-math", "-DFASTLLM_ISA=isa_default"]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.runs_on("anywhere"),
    pytest.mark.skipif(not IS_THOROUGH, reason="FASTLLM_TESTS=thorough runs it: it compiles the vector code twice"),
    *(
        pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool} here (Debian: {package})")
        for tool, package in (("g++", "g++"), (CROSS, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user"))
    ),
]


def _built(compiler, folder):
    """(the program, its objects): every source of the vector code, and the program that calls them."""
    folder.mkdir()
    objects = []
    for source in [*sorted((ROOT / "csrc" / "cpu" / "vector").glob("*.cpp")), ROOT / "tests" / "vector_kernels.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, "-c", source, "-o", objects[-1]], check=True)
    program = folder / "vector_kernels"
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return program, objects


def test_neon_gives_the_bytes_of_x86_without_avx(tmp_path):
    here, _ = _built("g++", tmp_path / "x86")
    there, objects = _built(CROSS, tmp_path / "arm")
    expected = subprocess.run([here], capture_output=True, check=True).stdout
    found = subprocess.run([EMULATOR, there], capture_output=True, check=True).stdout
    assert len(expected) > 100_000
    assert found == expected
    for name in ("gated", "norm", "linear_rows", "attention", "attention_step"):
        code = subprocess.run(
            ["aarch64-linux-gnu-objdump", "-d", *(o for o in objects if o.stem == name)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "fmul\tv" in code, f"{name}: no vector products"
