"""bench/gpu.sh and what it stands on: what a test file lacks, the commit through links, kernels compiled beforehand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from missing_packages import missing_packages

from fastllm.bench import cases, environment, prepare
from fastllm.bench.interpreter import without_interpreter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
# One call of an op on a pretended H100; prints for each kernel whether Triton had it already.
COMPILE = """
from functools import partial
import torch
from triton import knobs
from fastllm import OPS
from fastllm.bench import capture, cases
from fastllm.kernels.device import GPUS
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
make = partial(next(iter(cases.shapes_of("swiglu").values())), capture.CUDA, torch.bfloat16)
capture.launches(OPS["swiglu"], make, GPUS[90])
print(*hits)
"""


def python(code: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**without_interpreter(), **variables},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_what_torch_compile_is_timed_beside_has_shapes():
    (names,) = re.findall(r"--compile ([a-z_ ]+)\)", SCRIPT.read_text())
    assert [op.name for op in cases.selected(names.split())] == names.split()


# As torch 2.11's libraries for CUDA have them.
NOT_DETERMINISTIC = " does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms("


@pytest.mark.parametrize(
    "message",
    [
        f"nll_loss2d_forward_out_cuda_template{NOT_DETERMINISTIC}True, warn_only=True)'.",
        "Memory Efficient attention defaults to a non-deterministic algorithm. ",
        "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
    ],
)
def test_what_cuda_warns_of_fails_no_test(message):
    warnings.warn(message, UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)


def test_what_a_file_lacks_includes_what_torchs_helpers_import(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "expecttest" else find(name, *a))
    assert missing_packages(ROOT / "tests" / "ops" / "test_opinfo.py") == {"expecttest"}
    assert missing_packages(ROOT / "tests" / "test_ops.py") == set()


def test_no_file_lacks_what_is_here():
    """As gpu.sh asks, where the folder of the script is not on the path: the helpers in tests/ are no packages."""
    packages = ("expecttest", "hypothesis", "transformers", "peft", "starlette", "uvicorn", "sacrebleu", "numpy")
    run = subprocess.run(
        [sys.executable, "-P", ROOT / "tests" / "missing_packages.py"], capture_output=True, text=True, check=True
    )
    named = {name for line in run.stdout.splitlines() for name in line.partition(" ")[2].split(",")}
    assert not named & {"conftest", "contract", "toy", *filter(importlib.util.find_spec, packages)}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_found_through_links(tmp_path):
    package = tmp_path / "fastllm"
    package.mkdir()
    for source in [*(ROOT / "fastllm").iterdir(), *(ROOT / name for name in ("kernels", "bench", "csrc"))]:
        (package / source.name).symlink_to(source)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fastllm.bench import environment as e"
    file, commit = python(f"{code}; print(e.__file__); print(e.commit())").split()
    assert file.startswith(str(tmp_path))
    assert commit == environment.commit()


def test_kernels_compiled_beforehand_are_found_in_another_folder(tmp_path):
    before, after, carried = tmp_path / "before", tmp_path / "after", tmp_path / "carried"
    assert set(python(COMPILE, TRITON_CACHE_DIR=str(before)).split()) == {"False"}
    record = prepare.pack(before, carried)
    assert record["kernels"] == 2
    before.rename(tmp_path / "gone")
    assert prepare.unpack(carried, after) == record
    assert not list(after.rglob("*.ptx"))
    assert set(python(COMPILE, TRITON_CACHE_DIR=str(after)).split()) == {"True"}


def test_the_folder_to_carry_holds_the_archive_and_its_record_alone(tmp_path, monkeypatch):
    """1,288 kernels for sm_90 were 21 MB there, and 480 MB in Triton's cache."""

    def compile_all(names, arch, budget, workers, used):
        # The second is of an earlier call, whose sources were others: it stays, and is not carried.
        for key in ("key", "older"):
            kernel = Path(os.environ["TRITON_CACHE_DIR"], key)
            kernel.mkdir(parents=True)
            files = {name: str(kernel / name) for name in ("k.json", "k.cubin", "k.ptx")}
            for path in files.values():
                Path(path).write_text(json.dumps({"hash": key}))
            (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": files}))
        used.add("key")
        yield f"{names}: 1 kernel for sm_{arch}"

    monkeypatch.setenv("TRITON_CACHE_DIR", "another")
    monkeypatch.setattr(prepare, "check_compiles", lambda: None)
    monkeypatch.setattr(prepare, "compile_all", compile_all)
    assert prepare.main(["pack", str(tmp_path / "built"), "--op", "swiglu"]) == 0
    assert {path.name for path in (tmp_path / "built").iterdir()} == {prepare.ARCHIVE, prepare.RECORD}
    assert prepare.unpack(tmp_path / "built", tmp_path / "found")["kernels"] == 1
    assert (tmp_path / "found" / "key" / "k.cubin").exists()
    assert (tmp_path / "built.cache" / "key" / "k.ptx").exists()


def test_a_tree_without_its_git_takes_the_commit_from_what_was_prepared(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    record = prepare.pack(tmp_path / "cache", tmp_path)
    for sources, expected in ((record["sources"], "abc"), ("others", "")):
        (tmp_path / prepare.RECORD).write_text(json.dumps({**record, "commit": "abc", "sources": sources}))
        assert prepare.main(["commit", str(tmp_path)]) == 0
        assert capsys.readouterr().out.strip() == expected
        monkeypatch.setenv("FASTLLM_COMMIT", expected)
        monkeypatch.setattr(environment, "__file__", str(tmp_path / "bench" / "environment.py"))
        assert environment.commit() == (expected or None)
        monkeypatch.undo()


def test_kernels_of_another_triton_are_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    record = prepare.pack(tmp_path / "cache", tmp_path)
    assert prepare.commit_of(record) == environment.commit()
    assert prepare.commit_of({**record, "sources": "others"}) is None
    (tmp_path / prepare.RECORD).write_text(json.dumps({**record, "python": "3.99"}))
    with pytest.raises(ValueError, match=r"its python is 3\.99, here it is 3\.\d+: Triton would find no kernel"):
        prepare.unpack(tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench/gpu.sh OUT [SECONDS]"),
        (["out", "--part", "all of it"], "--part: expected correctness or speed"),
        (["out", "--cache", "/no/such"], "--cache: no folder /no/such"),
        (["out", "--parts", "speed"], "--parts: no such option"),
        (["out", "--part"], "--part: expected a value"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    run = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert message in run.stderr
    assert not list(tmp_path.iterdir())


def test_the_clocks_are_those_of_the_gpu_that_torch_has(monkeypatch):
    """CUDA_VISIBLE_DEVICES gives a GPU another number than nvidia-smi does."""
    asked = []
    monkeypatch.setattr(environment, "_run", lambda *command, cwd=None: asked.append(command[-1]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for properties in (SimpleNamespace(uuid="1234-56"), SimpleNamespace()):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert environment.environment(torch.device("cuda", 1))["gpu"] is None
    # Where that name says nothing, as on a part of a GPU, the number has to do.
    assert [option for option in asked if option.startswith("--id")] == ["--id=GPU-1234-56", "--id=1", "--id=1"]
