"""Prints the test files that cannot be imported here and the packages they need, as bench/gpu.sh asks."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# torch's own test helpers import packages that torch does not depend on; nothing else of an installed package does.
HELPERS = "torch.testing._internal"


def _file_of(module: str, beside: Path) -> Path | None:
    """The source that is looked into for further imports: of a file in tests/, or of torch's test helpers."""
    for folder in (beside.parent, TESTS):
        if (here := folder / f"{module}.py").exists():
            return here
    if not module.startswith(HELPERS) or importlib.util.find_spec("torch") is None:
        return None
    root = Path(importlib.util.find_spec("torch").origin).parent.parent
    found = root / (module.replace(".", "/") + ".py")
    return found if found.exists() else None


def _imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def missing_packages(file: Path, seen: set[Path] | None = None) -> set[str]:
    """The packages that ``file`` would not find, nor another file that it imports."""
    seen = set() if seen is None else seen
    if file in seen:
        return set()
    seen.add(file)
    found = set()
    for module in _imported(ast.parse(file.read_text(encoding="utf-8"))):
        source, package = _file_of(module, file), module.partition(".")[0]
        if source is not None and source != file:
            found |= missing_packages(source, seen)
        elif package != "__main__" and importlib.util.find_spec(package) is None:
            found.add(package)
    return found


if __name__ == "__main__":
    for file in sorted(TESTS.rglob("test_*.py")):
        packages = missing_packages(file)
        if packages:
            print(file.relative_to(TESTS.parent), ",".join(sorted(packages)))
