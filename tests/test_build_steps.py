"""Which compilations are done again, with ninja and without."""

import importlib
import os

import pytest

from fastllm.extension.compile.steps import BuildStep

# The package has a function of the module's name.
execute = importlib.import_module("fastllm.extension.compile.execute")


@pytest.mark.parametrize("ninja", [True, False])
def test_what_is_compiled_for_other_gpus_is_compiled_again(monkeypatch, tmp_path, ninja):
    if not ninja:
        monkeypatch.setattr(execute, "_find_ninja", lambda: None)
    elif execute._find_ninja() is None:
        pytest.skip("ninja is not installed (pip install ninja)")
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
