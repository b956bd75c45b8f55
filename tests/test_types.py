"""The types that editors show: functional.pyi says of each function what the function itself says."""

import ast
import inspect
from pathlib import Path

import pytest

import fastllm
from fastllm import functional

STUB = ast.parse(Path(functional.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
FORMS = [node for node in STUB.body if isinstance(node, ast.FunctionDef)]
NO_DEFAULT = object()


def _parameters(node):
    """(name, kind, default) of each parameter."""
    plain, named = node.args.args, node.args.kwonlyargs
    defaults = [None] * (len(plain) - len(node.args.defaults)) + node.args.defaults + node.args.kw_defaults
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(plain) + [inspect.Parameter.KEYWORD_ONLY] * len(named)
    values = [NO_DEFAULT if default is None else ast.literal_eval(default) for default in defaults]
    return [(arg.arg, kind, value) for arg, kind, value in zip([*plain, *named], kinds, values, strict=True)]


@pytest.mark.parametrize("node", FORMS, ids=lambda node: f"{node.name}-{node.lineno}")
def test_a_signature_is_the_functions_own(node):
    own = [
        (p.name, p.kind, NO_DEFAULT if p.default is inspect.Parameter.empty else p.default)
        for p in inspect.signature(getattr(functional, node.name)).parameters.values()
    ]
    found = _parameters(node)
    # Of overloads, the one that returns more has no default for what asks for more.
    required = {name for name, _, default in found if default is NO_DEFAULT} & {"return_lse", "return_entropy"}
    assert found == [(name, kind, NO_DEFAULT if name in required else default) for name, kind, default in own]
    assert all(arg.annotation is not None for arg in [*node.args.args, *node.args.kwonlyargs])
    assert node.returns is not None


def test_every_function_has_one():
    names = {node.name for node in FORMS}
    assert names == set(functional.__all__)
    (listed,) = (node for node in STUB.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert ast.literal_eval(listed.value) == functional.__all__
    assert Path(fastllm.__file__).with_name("py.typed").exists()
