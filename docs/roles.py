"""For mkdocstrings: Sphinx's roles, as in :func:`fastllm.accelerate`, are shown as the code that they name."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`[~!.]?([^`<>]+)`")


class Roles(griffe.Extension):
    """Takes the roles out of every docstring."""

    def on_object(self, *, obj: griffe.Object, **more: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
