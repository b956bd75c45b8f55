"""For mkdocstrings: the types of the stubs in the signatures, and Sphinx's roles as plain code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`[~!.]?([^`<>]+)`")
PACKAGE = Path(__file__).parent.parent / "fastllm"
# Where functions are -> the stub that has their types.
STUBS = {"fastllm.ops.": PACKAGE / "functional.pyi", "fastllm.losses.": PACKAGE / "losses" / "__init__.pyi"}


class Roles(griffe.Extension):
    """Takes what Markdown does not know out of every docstring: roles, as in :func:`fastllm.accelerate`, and ``::``."""

    def on_object(self, *, obj: griffe.Object, **more: object) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # before a block of code


class Types(griffe.Extension):
    """Gives public functions the signature of their stub. Where overloads differ, a type is their union."""

    def on_function(self, *, func: griffe.Function, **more: object) -> None:
        file = next((file for place, file in STUBS.items() if func.path.startswith(place)), None)
        forms = _forms(file).get(func.name) if file is not None and func.parent.is_module else None
        if not forms:
            return
        shown = forms[0].args  # the form with a default for every option
        plain = griffe.ParameterKind.positional_or_keyword
        defaults = [None] * (len(shown.args) - len(shown.defaults)) + shown.defaults + shown.kw_defaults
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    argument.arg,
                    annotation=_union(form[argument.arg] for form in map(_types, forms)),
                    kind=plain if argument in shown.args else griffe.ParameterKind.keyword_only,
                    default=None if default is None else ast.unparse(default),
                )
                for argument, default in zip((*shown.args, *shown.kwonlyargs), defaults, strict=True)
            )
        )
        func.returns = _union(form["return"] for form in map(_types, forms))


def _types(form: ast.FunctionDef) -> dict[str, str]:
    """Parameter, and ``return`` -> type."""
    found = {argument.arg: argument.annotation for argument in (*form.args.args, *form.args.kwonlyargs)}
    return {name: ast.unparse(kind) for name, kind in {**found, "return": form.returns}.items()}


def _union(types: Iterable[str]) -> str:
    kinds = dict.fromkeys(types)
    return "bool" if kinds.keys() <= {"bool", "Literal[False]", "Literal[True]"} else " | ".join(kinds)


@cache
def _forms(file: Path) -> dict[str, list[ast.FunctionDef]]:
    """Function -> its overloads in a stub, whose aliases are written out."""
    text = file.read_text("utf-8")
    for name, meaning in re.findall(r"^(_\w+): TypeAlias = (.*)$", text, re.MULTILINE):
        text = re.sub(rf"\b{name}\b(?!:)", meaning, text)
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found
