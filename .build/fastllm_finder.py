"""Finds the package fastllm in a checkout; written by its build backend, ``pip install -e`` puts it here."""

import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = "@ROOT@"
# Packages of a checkout that lie beside fastllm, and install within it.
BESIDE = ("kernels", "bench")


class Finder:
    """A whole package on ``sys.path`` comes first, as for every install; a folder that is none does not."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        parent, _, child = name.rpartition(".")
        if name != "fastllm" and not (parent == "fastllm" and child in BESIDE):
            return None
        found = PathFinder.find_spec(name, path, target)
        if found is not None and found.has_location:
            return found
        if name == "fastllm":
            return _package(name, Path(ROOT, "fastllm"))
        # Those beside the package that was imported, so that two checkouts are never mixed.
        packages = (_package(name, Path(folder).parent / child) for folder in path or ())
        return next(filter(None, packages), None)


def _package(name, folder):
    source = folder / "__init__.py"
    if not source.is_file():
        return None
    return spec_from_file_location(name, source, submodule_search_locations=[str(folder)])


def install():
    """Put the finder before Python's own, whose empty namespace packages would hide the checkout."""
    if Finder not in sys.meta_path:
        at = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
        sys.meta_path.insert(at, Finder)
