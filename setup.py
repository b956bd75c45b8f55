"""Maps the folder kernels/ to the package fastllm.kernels, and bench/ to fastllm.bench; metadata: pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastllm", "fastllm.*"]), "fastllm.kernels", "fastllm.bench"],
    package_dir={"fastllm": "fastllm", "fastllm.kernels": "kernels", "fastllm.bench": "bench"},
)
