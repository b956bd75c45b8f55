"""For mkdocstrings: the types of fastllm/functional.pyi in the signatures, and Sphinx's roles as plain code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`[~!.]?([^`<>]+)`")
STUB = Path(__file__).parent.parent / "fastllm" / "functional.pyi"


class Roles(griffe.Extension):
    """Takes the roles, as in :func:`fastllm.accelerate`, out of every docstring."""

    def on_object(self, *, obj: griffe.Object, **more: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)


class Types(griffe.Extension):
    """Gives the public functions of the ops the types of the stub. Where overloads differ, a type is their union."""

    def on_function(self, *, func: griffe.Function, **more: object) -> None:
        stubs = _stubs()
        if not func.path.startswith("fastllm.ops.") or not func.parent.is_module or func.name not in stubs:
            return
        *types, returned = zip(*stubs[func.name], strict=True)
        for parameter, found in zip((p for p in func.parameters if p.name != "*"), types, strict=True):
            parameter.annotation = _union(found)
        func.returns = _union(returned)


def _union(types: tuple[str, ...]) -> str:
    joined = " | ".join(dict.fromkeys(types))
    return "bool" if joined in ("Literal[False] | Literal[True]", "Literal[True] | Literal[False]") else joined


@cache
def _stubs() -> dict[str, list[tuple[str, ...]]]:
    """Function -> for each overload the types of its parameters, in order, and of what it returns."""
    tree = ast.parse(STUB.read_text("utf-8"))
    aliases = {node.target.id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.AnnAssign)}
    found: dict[str, list[tuple[str, ...]]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            given = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)]
            texts = [ast.unparse(part) for part in (*given, node.returns)]
            found.setdefault(node.name, []).append(
                tuple(re.sub(r"\b_\w+", lambda name: aliases.get(name[0], name[0]), text) for text in texts)
            )
    return found
