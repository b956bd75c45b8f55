"""Maps kernels/, bench/ and csrc/ into the package fastllm, and builds the extension where that can be done.

The metadata is in pyproject.toml, the build itself in fastllm/extension/compile/.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The extension uses Python's stable API alone: one wheel of a platform serves every Python from 3.10 on, but those
# without the global lock, which have no such API.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")


def _load_build():
    # By path: importing fastllm would import torch, which an isolated build cannot see.
    folder = ROOT / "fastllm" / "extension" / "compile"
    spec = importlib.util.spec_from_file_location(
        "fastllm_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildExtension(build_ext):
    """Hands over to extension/compile/. Without a compiler or torch it says so and the installation goes on."""

    def build_extension(self, ext):
        build = _load_build()
        try:
            line = build.build(Path(self.get_ext_fullpath(ext.name)), ROOT / "build" / "extension")
        except ValueError as error:
            raise SystemExit(f"fastllm: {error}") from None
        except (build.CannotBuild, OSError) as error:
            if build.cuda_wish() == "1":
                raise SystemExit(f"fastllm: {error}") from None
            line = f"fastllm: the extension was not built: {error}; its ops fall back to eager PyTorch"
        print(line, file=sys.stderr, flush=True)


setup(
    packages=[
        *find_packages(include=["fastllm", "fastllm.*"]),
        *(f"fastllm.{name}" for name in find_packages(include=["kernels", "kernels.*", "bench"])),
        "fastllm.csrc",
    ],
    package_dir={"fastllm": "fastllm", "fastllm.kernels": "kernels", "fastllm.bench": "bench", "fastllm.csrc": "csrc"},
    package_data={
        "fastllm": ["py.typed", "*.pyi"],
        "fastllm.losses": ["*.pyi"],
        "fastllm.serving": ["page.html"],
        "fastllm.data.clean": ["block_model.npz", "related_headings.txt"],
        "fastllm.bench": ["personal_lines.txt"],
        "fastllm.csrc": ["*.h", "*.cpp", "*/*.h", "*/*.cpp", "*/*.cu", "*/*.cuh", "*/*/*.h", "*/*/*.cpp"],
    },
    ext_modules=[Extension("fastllm._C", sources=[], optional=True, py_limited_api=STABLE)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE else {},
    cmdclass={"build_ext": BuildExtension},
)
