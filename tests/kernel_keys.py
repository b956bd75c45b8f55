"""The keys by which Triton finds compiled kernels, asked for in one order and the other, each in a process of its own.

    python tests/kernel_keys.py

prints each kernel or device function whose key differs, and how many there are.
"""

import importlib
import json
import os
import pkgutil

from triton.runtime.jit import JITFunction

from fastllm import kernels


def functions() -> dict[str, JITFunction]:
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        members = vars(importlib.import_module(module.name))
        found |= {f"{module.name}.{name}": f for name, f in members.items() if isinstance(f, JITFunction)}
    return found


def keys(names) -> dict[str, str]:
    """In a copy of this process: a key stays as it was first asked for."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        with open(writer, "w") as out:
            json.dump({name: functions()[name].cache_key for name in names}, out)
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        return json.load(told)


if __name__ == "__main__":
    names = list(functions())
    forwards, backwards = keys(names), keys(names[::-1])
    for name in names:
        if forwards[name] != backwards[name]:
            print("DIFFERS", name)
    print(len(names), "functions")
