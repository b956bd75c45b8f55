"""The types that editors show: functional.pyi says of each function what the function itself says.

``python tests/test_types.py`` brings functional.pyi up to the functions. It takes the type of a new parameter from the
default and a new function's result for a Tensor; where they are something else, the entry is to be edited.
"""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import fastllm
from fastllm import functional

FILE = Path(functional.__file__).with_suffix(".pyi")
TEXT = FILE.read_text(encoding="utf-8")
STUB = ast.parse(TEXT)
FORMS = [node for node in STUB.body if isinstance(node, ast.FunctionDef)]
NO_DEFAULT = object()


def _parameters(node):
    """(name, kind, default) of each parameter."""
    plain, named = node.args.args, node.args.kwonlyargs
    defaults = [None] * (len(plain) - len(node.args.defaults)) + node.args.defaults + node.args.kw_defaults
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(plain) + [inspect.Parameter.KEYWORD_ONLY] * len(named)
    values = [NO_DEFAULT if default is None else ast.literal_eval(default) for default in defaults]
    return [(arg.arg, kind, value) for arg, kind, value in zip([*plain, *named], kinds, values, strict=True)]


def _own(node):
    """The function's parameters, as _parameters gives those of its entry ``node``."""
    # Of overloads, the one that returns more has no default for what asks for more.
    required = {name for name, _, default in _parameters(node) if default is NO_DEFAULT}
    required &= {"return_lse", "return_entropy"}
    return [
        (p.name, p.kind, NO_DEFAULT if p.default is inspect.Parameter.empty or p.name in required else p.default)
        for p in inspect.signature(getattr(functional, node.name)).parameters.values()
    ]


def _guessed_type(default) -> str:
    if isinstance(default, bool | int | float | str):
        return type(default).__name__
    return "Tensor | None" if default is None else "Tensor"


def _entry(node) -> str:
    """``node`` with the function's parameters; an annotation that is there stays."""
    types = {arg.arg: ast.unparse(arg.annotation) for arg in [*node.args.args, *node.args.kwonlyargs]}
    shown, named = [], False
    for name, kind, default in _own(node):
        if kind is inspect.Parameter.KEYWORD_ONLY and not named:
            shown, named = [*shown, "*"], True
        shown.append(f"{name}: {types.get(name) or _guessed_type(default)}")
        shown[-1] += "" if default is NO_DEFAULT else f" = {default!r}"
    decorators = "".join(f"@{ast.unparse(d)}\n" for d in node.decorator_list)
    return f"{decorators}def {node.name}({', '.join(shown)}) -> {ast.unparse(node.returns)}: ...\n"


def updated() -> str:
    """The text of functional.pyi for the functions as they are, unformatted where an entry is new."""
    listed = "".join(f'    "{name}",\n' for name in functional.__all__)
    lines = TEXT.splitlines(keepends=True)
    first = min(node.lineno - len(node.decorator_list) for node in FORMS)
    text = re.sub(r"__all__ = \[\n.*?\]", f"__all__ = [\n{listed}]", "".join(lines[: first - 1]), flags=re.DOTALL)
    for name in functional.__all__:
        nodes = [node for node in FORMS if node.name == name]
        for node in nodes or ast.parse(f"def {name}() -> Tensor: ...").body:
            same = nodes and _parameters(node) == _own(node)
            entry = lines[node.lineno - 1 - len(node.decorator_list) : node.end_lineno]
            text += "".join(entry) if same else _entry(node)
    return text


@pytest.mark.parametrize("node", FORMS, ids=lambda node: f"{node.name}-{node.lineno}")
def test_a_signature_is_the_functions_own(node):
    assert _parameters(node) == _own(node)
    assert all(arg.annotation is not None for arg in [*node.args.args, *node.args.kwonlyargs])
    assert node.returns is not None


def test_every_function_has_one():
    names = {node.name for node in FORMS}
    assert names == set(functional.__all__)
    (listed,) = (node for node in STUB.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert ast.literal_eval(listed.value) == functional.__all__
    assert Path(fastllm.__file__).with_name("py.typed").exists()


def test_a_new_function_and_a_new_option_get_an_entry(monkeypatch):
    assert updated() == TEXT

    def swiglu(gate, up=None, *, limit=1.0):
        return gate

    monkeypatch.setattr(functional, "swiglu", swiglu)
    monkeypatch.setattr(functional, "__all__", [*functional.__all__, "twice"])
    monkeypatch.setattr(functional, "twice", lambda input: 2 * input, raising=False)
    found = updated()
    assert "def swiglu(gate: Tensor, up: Tensor | None = None, *, limit: float = 1.0) -> Tensor: ..." in found
    assert "def twice(input: Tensor) -> Tensor: ..." in found
    assert '    "twice",\n]' in found


if __name__ == "__main__":
    FILE.write_text(updated(), encoding="utf-8")
    subprocess.run(["ruff", "format", "--quiet", FILE], check=True)
