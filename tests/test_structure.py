"""How the code is built, read from its syntax: parameters, imports, names and attributes."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("fastllm", "kernels", "bench")
HOST, KERNEL = 6, 16
# Every command, and every part of the bench, may have one of its own.
SHARED_NAMES = {"run", "main", "add_arguments"}
# PyTorch's own positional arguments: a public function has them, its reference and what checks the call.
AS_IN_TORCH = {
    "input target weight size_average ignore_index reduce reduction label_smoothing",
    "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
    "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal",
}


@cache
def trees() -> dict[str, ast.Module]:
    """Path from the root -> the module's syntax."""
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in files}


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(dotted name, definition) of every function, those within others and within classes too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(node, f"{prefix}{node.name}." if named else prefix)


def is_kernel(node: ast.FunctionDef) -> bool:
    names = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any(ast.unparse(name).rpartition(".")[2] == "jit" for name in names)


def positional(node: ast.FunctionDef) -> list[str]:
    """Its positional parameters, without self and cls."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def long_signatures() -> Iterator[str]:
    for path, tree in trees().items():
        for name, node in functions(tree):
            names = positional(node)
            if is_kernel(node):
                too_long = len(names) + len(node.args.kwonlyargs) > KERNEL
            else:
                too_long = len(names) > HOST and " ".join(names) not in AS_IN_TORCH
            if too_long:
                yield f"{path}: {name}"


def indexed_inputs() -> Iterator[str]:
    for path, tree in trees().items():
        for name, node in functions(tree):
            if name.rpartition(".")[2] != "setup_context":
                continue
            inputs = node.args.args[-2].arg
            for part in ast.walk(node):
                if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id == inputs:
                    yield f"{path}: {name}"


def module_name(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] != "fastllm":
        parts.insert(0, "fastllm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of this repository that one imports, at any depth of its code."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return found & modules


def import_circles() -> Iterator[str]:
    """Each set of modules that import one another, whenever they do."""
    modules = {module_name(path) for path in trees()}
    graph = {module_name(path): imports(path, tree, modules) for path, tree in trees().items()}

    def reached(start: str) -> set[str]:
        seen, todo = set(), list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        return seen

    reach = {module: reached(module) for module in graph}
    circles = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in graph
        if module in reach[module]
    }
    for circle in sorted(circles):
        yield " ".join(circle)


# The rooms from the ground up: each imports those on its own line and on the lines before. Modules that no line names
# serve all of them.
FLOORS = (
    "registry kernels extension data",
    "ops functional nn losses",
    "models drop_in api",
    "generate tasks",
    "training serving",
    "commands",
    "cli __main__",
)


def floor(module: str) -> int | None:
    """Which line of FLOORS names the room of ``fastllm.<room>...``; None for a module that all may import."""
    room = module.split(".")[1] if "." in module else ""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms.split()), None)


def upward_imports() -> Iterator[str]:
    """Imports of a room that stands above the importing one."""
    modules = {module_name(path) for path in trees()}
    for path, tree in trees().items():
        own = floor(module_name(path))
        for other in sorted(imports(path, tree, modules)):
            above = floor(other)
            if own is not None and above is not None and above > own:
                yield f"{path} imports {other}"


def hidden_modules() -> Iterator[str]:
    for path in trees():
        inside = path.startswith(("fastllm/ops/", "kernels/"))
        if inside and any(part.startswith("_") and part != "__init__.py" for part in Path(path).parts):
            yield path


def names_defined_twice() -> Iterator[str]:
    """Public classes and functions at the top of modules; a private one, ``_x``, is its module's own business."""
    where = defaultdict(list)
    for path, tree in trees().items():
        if path.startswith("bench/"):
            continue
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and node.name not in SHARED_NAMES:
                where[node.name].append(path)
    for name, paths in sorted(where.items()):
        if len(paths) > 1:
            yield f"{name} in {' '.join(sorted(paths))}"


BIRTH = {"__init__", "__new__", "__post_init__"}


def own_attributes(cls: ast.ClassDef, *, at_birth: bool) -> set[str]:
    """What ``self.x = ...`` sets in the methods of BIRTH, or in all others."""
    found = set()
    for node in cls.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (node.name in BIRTH) != at_birth:
            continue
        for part in ast.walk(node):
            stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
            if stored and isinstance(part.value, ast.Name) and part.value.id == "self":
                found.add(part.attr)
    return found


def late_attributes() -> Iterator[str]:
    """Attributes that neither a class nor its base classes have at the top or from ``__init__``."""
    classes = {
        node.name: node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }

    def born(cls: ast.ClassDef) -> set[str]:
        found = own_attributes(cls, at_birth=True)
        for node in cls.body:
            if isinstance(node, ast.AnnAssign):
                found.add(ast.unparse(node.target))
            elif isinstance(node, ast.Assign):
                found |= {ast.unparse(target) for target in node.targets}
            elif isinstance(node, ast.FunctionDef):  # a property and its setter
                found.add(node.name)
        for base in cls.bases:
            name = ast.unparse(base).rpartition(".")[2]
            if name in classes and name != cls.name:
                found |= born(classes[name])
        return found

    for path, tree in trees().items():
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for name in sorted(own_attributes(cls, at_birth=False) - born(cls)):
                yield f"{path}: {cls.name}.{name}"


RULES = {
    "signature": (long_signatures, f"more than {HOST} positional parameters, {KERNEL} on a kernel; pass a value"),
    "inputs": (indexed_inputs, "setup_context indexes its inputs; unpack them by name"),
    "circle": (import_circles, "these import one another"),
    "upward": (upward_imports, "a room imports those below it only"),
    "hidden": (hidden_modules, "a module in ops/ or kernels/ has no underscore"),
    "twice": (names_defined_twice, "a public name is defined once in fastllm and kernels"),
    "late": (late_attributes, "an attribute is born in __init__"),
}


def offenders(rule: str) -> set[str]:
    return set(RULES[rule][0]())


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    assert not offenders(rule), f"{RULES[rule][1]}: {sorted(offenders(rule))}"


def test_every_signature_of_torchs_is_somebodys():
    found = {" ".join(positional(node)) for tree in trees().values() for _, node in functions(tree)}
    assert found >= AS_IN_TORCH


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("signature", "def f(a, b, c, d, e, f, g): pass"),
        ("signature", "import triton\n@triton.jit\ndef k(" + ", ".join(f"a{i}" for i in range(17)) + "): pass"),
        ("inputs", "class F:\n    def setup_context(ctx, inputs, output):\n        ctx.x = inputs[3]"),
        ("circle", "def f():\n    from .backends import pick"),
        ("upward", "def f():\n    from .commands import COMMANDS"),
        ("twice", "def f(): pass\ndef pick(): pass"),
        ("late", "class A:\n    def f(self):\n        self.x = 1"),
    ],
)
def test_a_rule_sees_what_it_forbids(monkeypatch, rule, code):
    before = offenders(rule)
    # It stands in for a module that fastllm/backends.py imports, so that an import of that is a circle.
    monkeypatch.setitem(trees(), "fastllm/registry.py", ast.parse(code))
    assert offenders(rule) - before


def test_a_module_with_an_underscore_is_seen(monkeypatch):
    monkeypatch.setitem(trees(), "kernels/_x.py", ast.parse(""))
    assert "kernels/_x.py" in offenders("hidden")


def test_nothing_needs_a_docstring():
    """``python -OO`` leaves them out: ``__doc__`` is None."""
    taken = [
        f"{path}:{node.lineno}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Subscript)
        and (getattr(node.value, "id", "") == "__doc__" or getattr(node.value, "attr", "") == "__doc__")
    ]
    assert not taken
