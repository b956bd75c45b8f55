"""setuptools' build backend, but for editable installs: ``pip install -e .`` puts a finder of our own in their wheel.

setuptools' finder comes last on ``sys.meta_path``. A folder called fastllm in the folder that Python was started in,
which a clone is to whoever stands beside it, is found before as a namespace package, empty.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parent.parent
FINDER = Path(__file__).with_name("fastllm_finder.py")
MODULE = "__editable___fastllm_finder"


def finder_files(root: Path) -> dict[str, str]:
    """The files in site-packages that make the checkout ``root`` importable: by name, their text."""
    return {
        f"{MODULE}.py": FINDER.read_text(encoding="utf-8").replace('"@ROOT@"', repr(str(root))),
        f"{MODULE}.pth": f"import {MODULE}; {MODULE}.install()\n",
    }


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    wheel = Path(wheel_directory, name)
    with zipfile.ZipFile(wheel) as file:
        content = {item: file.read(item) for item in file.namelist()}
    # Its finder and the line that loads it; a strict or compatible install has none, and stays as it is.
    theirs = [item for item in content if item.startswith("__editable__") and item.endswith((".py", ".pth"))]
    if not any(item.endswith("_finder.py") for item in theirs):
        return name
    for item in theirs:
        del content[item]
    content |= {item: text.encode() for item, text in finder_files(ROOT).items()}
    (record,) = (item for item in content if item.endswith(".dist-info/RECORD"))
    del content[record]
    lines = [f"{item},{_digest(data)},{len(data)}" for item, data in content.items()]
    content[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        for item, data in content.items():
            file.writestr(item, data)
    return name


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
