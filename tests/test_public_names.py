"""The public names and their signatures are those of tests/public_names.txt.

``python tests/test_public_names.py`` writes the file anew, for a change that is meant.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).parent / "public_names.txt"
MODULES = ("", ".functional", ".losses", ".nn", ".models", ".training", ".data", ".generate", ".drop_in", ".search")


def signature(value) -> str:
    """Parameters and defaults. Annotations are left out, as their text varies with Python; "..." is torch's own."""
    if inspect.isclass(value):
        maker = next(cls for cls in value.__mro__ if {"__init__", "__new__"} & set(vars(cls)))
        if not maker.__module__.startswith("fastllm"):
            return "(...)"
    found = inspect.signature(value)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    # Where a default value has no text of its own, its address differs from run to run.
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.Signature(plain)))


def public(module) -> Iterator[tuple[str, object]]:
    for name in sorted(getattr(module, "__all__", None) or vars(module)):
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("fastllm") or not hasattr(value, "__module__")
        if not name.startswith("_") and not inspect.ismodule(value) and ours:
            yield name, value


def members(cls: type) -> dict[str, object]:
    """What the class defines or inherits of ours: a method may move to a base without a change for its users."""
    ours = (base for base in reversed(cls.__mro__) if base.__module__.startswith("fastllm"))
    return {name: value for base in ours for name, value in vars(base).items()}


def lines() -> Iterator[str]:
    for suffix in MODULES:
        module = importlib.import_module(f"fastllm{suffix}")
        for name, value in public(module):
            kind = "class" if inspect.isclass(value) else "def" if callable(value) else "value"
            yield f"{module.__name__}.{name}: {kind}{signature(value) if callable(value) else ''}"
            if not inspect.isclass(value):
                continue
            for method, found in sorted(members(value).items()):
                if isinstance(found, property):
                    yield f"{module.__name__}.{name}.{method}: property"
                elif not method.startswith("_") and callable(getattr(value, method)):
                    yield f"{module.__name__}.{name}.{method}: def{signature(getattr(value, method))}"


def test_public_names_and_signatures_are_as_they_were():
    expected, found = FILE.read_text("utf-8").splitlines(), list(lines())
    gone, new = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    assert not gone, f"gone or changed: {gone}; new: {new}"
    assert not new, f"new, so write {FILE.name} again: {new}"


def test_a_changed_signature_shows(monkeypatch):
    import fastllm.functional

    before = list(lines())
    monkeypatch.setattr(fastllm.functional, "swiglu", lambda gate, up=None, more=0: gate)
    assert list(lines()) != before


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()), "utf-8")
