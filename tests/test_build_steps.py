"""Which compilations are done again, with ninja and without."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm.extension.compile import CannotBuild, find_compiler
from fastllm.extension.compile.steps import BuildStep

# The package has a function of the module's name.
execute = importlib.import_module("fastllm.extension.compile.execute")


@pytest.fixture(params=[True, False], ids=["ninja", "alone"])
def by_ninja_or_alone(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(execute, "_find_ninja", lambda: None)
    elif execute._find_ninja() is None:
        pytest.skip("ninja is not installed (pip install ninja)")


@pytest.mark.usefixtures("by_ninja_or_alone")
def test_what_is_compiled_for_other_gpus_is_compiled_again(tmp_path):
    source, log = tmp_path / "source.cu", tmp_path / "log"
    source.touch()
    os.utime(source, (1, 1))

    def build(gpus):
        log.write_text("")
        outputs = [tmp_path / "source.cu.o", tmp_path / "library.so"]
        steps = [
            BuildStep(["sh", "-c", f"echo {output.name} {gpus} >> {log}; touch {output}"], output, inputs)
            for output, inputs in zip(outputs, ([source], outputs[:1]), strict=True)
        ]
        execute.execute(steps, tmp_path)
        return log.read_text().split("\n")[:-1]

    assert build("9.0") == ["source.cu.o 9.0", "library.so 9.0"]
    assert build("9.0") == []
    assert build("12.0") == ["source.cu.o 12.0", "library.so 12.0"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
@pytest.mark.usefixtures("by_ninja_or_alone")
def test_names_of_any_bytes_are_compiled(tmp_path):
    work = tmp_path / os.fsdecode(b"M\xfcll \xc3\xbc")
    work.mkdir()
    (work / "source").touch()
    for said in ("", "exit 1"):
        command = [
            "sh",
            "-c",
            f'e=err; echo "${{e}}or in $0"; echo "${{e}}or in $0" >&2; touch "$0"; {said}',
            str(work / "library"),
        ]
        steps = [BuildStep(command, work / "library", [work / "source"])]
        if said:
            with pytest.raises(CannotBuild, match=r"error in .*M.*ll .*library \(all of it in .*build.log\)"):
                execute.execute(steps, work)
        else:
            execute.execute(steps, work)
            assert (work / "library").is_file()


def test_a_compiler_that_the_machine_cannot_run_is_named(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"\x7fELF for another machine")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CannotBuild, match=r"c\+\+ does not run: Exec format error"):
        find_compiler()


def test_a_setting_that_means_nothing_ends_an_installation_in_one_line(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    ended = subprocess.run(
        command, cwd=root, env=os.environ | {"FASTLLM_CUDA": "maybe"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "fastllm: FASTLLM_CUDA: expected auto, 0 or 1, got 'maybe'"
    assert "Traceback" not in ended.stderr
