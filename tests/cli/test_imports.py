"""What the command line imports: a command that needs no torch starts without it."""

import importlib
import subprocess
import sys

import pytest
from extras import needed

from fastllm import OPS
from fastllm.training import RunConfig


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--help", 0), ("nonsense", 2)])
def test_what_needs_no_torch_imports_none(argument, code):
    look = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'numpy' in sys.modules)); "
    look += f"sys.argv = ['fastllm', {argument!r}]; from fastllm.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[-1] == "False False"


@pytest.mark.runs_on("anywhere")
def test_commands_that_need_no_torch_import_none(tmp_path):
    """All their work in one process, then what it imported; plan counts on tensors, so only its refusals are free."""
    needed("ftfy", "data")
    (tmp_path / "page.txt").write_text("The import statement finds a module and binds its name. " * 40)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(RunConfig().to_toml())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens": 9, "seconds": 1.0}\n' * 3)
    calls = [
        ["prepare", "page.txt", "--out", "clean", "--workers", "1", "--quiet"],
        ["tokenizer", "train", "page.txt", "--out", "tok", "--vocab-size", "300", "--quiet"],
        ["tokenizer", "show", "a module", "--tokenizer", "tok"],
        ["tokenizer", "encode", "page.txt", "--tokenizer", "tok", "--out", "encoded", "--quiet"],
        ["report", "run"],
    ]
    look = (
        "import sys; sys.argv = ['fastllm']; from fastllm.cli import main; import contextlib, io\n"
        f"for call in {calls!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        assert main(call) == 0, call\n"
        "print(main(['plan', '--gpus', '0']), [m for m in ('torch', 'transformers', 'sympy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "2 []\n", result.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"clean", "tok", "encoded", "report.html"}


@pytest.mark.runs_on("anywhere")
def test_info_imports_what_it_uses():
    """A model's first pass as well: an embedding sum of learned positions is what a GPT begins with."""
    heavy = ("sympy", "transformers", "torch._dynamo", "triton", "scipy")
    look = (
        "import contextlib, io, sys; sys.argv = ['fastllm']; from fastllm.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['info'])\n"
        "import torch; from fastllm.models import *\n"
        "model = build_model(ModelConfig(vocab_size=9, num_layers=1, num_heads=1, hidden_size=8))\n"
        "model(torch.ones(1, 3, dtype=torch.long)).sum().backward()\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.runs_on("anywhere")
def test_the_package_has_its_names_in_the_command_line_too():
    look = (
        "import sys; sys.argv = ['fastllm']; import fastllm; "
        "print(hasattr(fastllm, 'nothing'), 'torch' in sys.modules); "
        "from fastllm import *; print(len(OPS), fastllm.nn.RMSNorm.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert result.stdout == f"False False\n{len(OPS)} RMSNorm\n", result.stderr


@pytest.mark.runs_on("anywhere")
def test_names_that_come_late_are_those_of_api(tmp_path, monkeypatch):
    """Also one that a submodule has too, as ``fastllm.training.evaluate``, and all of them by a star."""
    folder = tmp_path / "late_package"
    folder.mkdir()
    late = "from fastllm.quiet_interrupt import late_names\n__getattr__ = late_names(__name__, __file__)\n"
    (folder / "__init__.py").write_text(late)
    (folder / "api.py").write_text("from .evaluate import evaluate\n__all__ = ['evaluate']\n")
    (folder / "evaluate.py").write_text("def evaluate(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("late_package")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
    assert "late_package.api" not in sys.modules
    from late_package import evaluate

    assert evaluate() == package.evaluate() == 1
    assert package.__all__ == ["evaluate"]
