"""The types that editors show: a module's stub says of each function what the function itself says.

``python tests/test_types.py`` brings the stubs up to the functions. It takes the type of a new parameter from the
default and a new function's result for a Tensor; where they are something else, the entry is to be edited.
"""

import ast
import inspect
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import fastllm
from fastllm import functional, losses

MODULES = (functional, losses)
NO_DEFAULT = object()


def _file(module: ModuleType) -> Path:
    return Path(module.__file__).with_suffix(".pyi")


def _forms(text: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]


def _parameters(node):
    """(name, kind, default) of each parameter."""
    plain, named = node.args.args, node.args.kwonlyargs
    defaults = [None] * (len(plain) - len(node.args.defaults)) + node.args.defaults + node.args.kw_defaults
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(plain) + [inspect.Parameter.KEYWORD_ONLY] * len(named)
    values = [NO_DEFAULT if default is None else ast.literal_eval(default) for default in defaults]
    return [(arg.arg, kind, value) for arg, kind, value in zip([*plain, *named], kinds, values, strict=True)]


def _own(module, node):
    """The function's parameters, as _parameters gives those of its entry ``node``."""
    # Of overloads, the one that returns more has no default for what asks for more.
    required = {name for name, _, default in _parameters(node) if default is NO_DEFAULT}
    required &= {"return_lse", "return_entropy", "return_metrics"}
    return [
        (p.name, p.kind, NO_DEFAULT if p.default is inspect.Parameter.empty or p.name in required else p.default)
        for p in inspect.signature(getattr(module, node.name)).parameters.values()
    ]


def _guessed_type(default) -> str:
    if isinstance(default, bool | int | float | str):
        return type(default).__name__
    return "Tensor | None" if default is None else "Tensor"


def _entry(module, node) -> str:
    """``node`` with the function's parameters; an annotation that is there stays."""
    types = {arg.arg: ast.unparse(arg.annotation) for arg in [*node.args.args, *node.args.kwonlyargs]}
    shown, named = [], False
    for name, kind, default in _own(module, node):
        if kind is inspect.Parameter.KEYWORD_ONLY and not named:
            shown, named = [*shown, "*"], True
        shown.append(f"{name}: {types.get(name) or _guessed_type(default)}")
        shown[-1] += "" if default is NO_DEFAULT else f" = {default!r}"
    decorators = "".join(f"@{ast.unparse(d)}\n" for d in node.decorator_list)
    return f"{decorators}def {node.name}({', '.join(shown)}) -> {ast.unparse(node.returns)}: ...\n"


def updated(module: ModuleType) -> str:
    """The text of the module's stub for the functions as they are, unformatted where an entry is new."""
    old = _file(module).read_text(encoding="utf-8")
    forms, lines = _forms(old), old.splitlines(keepends=True)
    listed = "".join(f'    "{name}",\n' for name in module.__all__)
    first = min(node.lineno - len(node.decorator_list) for node in forms)
    text = re.sub(r"__all__ = \[\n.*?\]", f"__all__ = [\n{listed}]", "".join(lines[: first - 1]), flags=re.DOTALL)
    for name in module.__all__:
        nodes = [node for node in forms if node.name == name]
        for node in nodes or ast.parse(f"def {name}() -> Tensor: ...").body:
            same = nodes and _parameters(node) == _own(module, node)
            entry = lines[node.lineno - 1 - len(node.decorator_list) : node.end_lineno]
            text += "".join(entry) if same else _entry(module, node)
    return text


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_signature_is_the_functions_own(module):
    for node in _forms(_file(module).read_text(encoding="utf-8")):
        assert (node.name, _parameters(node)) == (node.name, _own(module, node))
        assert all(arg.annotation is not None for arg in [*node.args.args, *node.args.kwonlyargs])
        assert node.returns is not None


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_function_has_one(module):
    stub = ast.parse(_file(module).read_text(encoding="utf-8"))
    assert {node.name for node in stub.body if isinstance(node, ast.FunctionDef)} == set(module.__all__)
    (listed,) = (node for node in stub.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert ast.literal_eval(listed.value) == module.__all__
    assert updated(module) == _file(module).read_text(encoding="utf-8")
    assert Path(fastllm.__file__).with_name("py.typed").exists()


def test_a_new_function_and_a_new_option_get_an_entry(monkeypatch):
    def swiglu(gate, up=None, *, limit=1.0):
        return gate

    monkeypatch.setattr(functional, "swiglu", swiglu)
    monkeypatch.setattr(functional, "__all__", [*functional.__all__, "twice"])
    monkeypatch.setattr(functional, "twice", lambda input: 2 * input, raising=False)
    found = updated(functional)
    assert "def swiglu(gate: Tensor, up: Tensor | None = None, *, limit: float = 1.0) -> Tensor: ..." in found
    assert "def twice(input: Tensor) -> Tensor: ..." in found
    assert '    "twice",\n]' in found


if __name__ == "__main__":
    for module in MODULES:
        _file(module).write_text(updated(module), encoding="utf-8")
        subprocess.run(["ruff", "format", "--quiet", _file(module)], check=True)
