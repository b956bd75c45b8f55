"""An editable install, as ``pip install -e .`` makes it, from wherever Python is started: a clone is called fastllm."""

import importlib
import importlib.util
import re
import site
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

import fastllm

ROOT = Path(fastllm.__file__).resolve().parents[1]
BACKEND = ROOT / ".build" / "fastllm_backend.py"
pytest.importorskip("setuptools", reason="setuptools is not installed: the build backend cannot be loaded")
pytestmark = pytest.mark.skipif(not BACKEND.exists(), reason="fastllm is not imported from a checkout")


def backend():
    spec = importlib.util.spec_from_file_location("fastllm_backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with a clone called fastllm, and a Python in which that is installed: ``(folder, python)``."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "fastllm").symlink_to(ROOT)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    for name, text in backend().finder_files(folder / "fastllm").items():
        (packages / name).write_text(text)
    # A .pth file's paths are added as they are: another install of fastllm there is not switched on.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder, folder / "venv" / "bin" / "python"


def output(beside, *command, cwd=None):
    folder, python = beside
    result = subprocess.run(
        [python, *map(str, command)], cwd=cwd or folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


WHERE = "from importlib.util import find_spec; print(find_spec('fastllm').origin)"


@pytest.mark.parametrize("cwd", ["", "fastllm", "fastllm/tests", "fastllm/fastllm"])
def test_python_finds_the_clone_from(beside, cwd):
    found = output(beside, "-c", WHERE, cwd=beside[0] / cwd)
    assert [Path(file).resolve() for file in found] == [ROOT / "fastllm" / "__init__.py"]


def test_without_the_finder_the_folder_beside_is_taken_for_an_empty_package(beside):
    """What the finder is for: should Python come to do otherwise, it can go."""
    assert output(beside, "-S", "-c", WHERE) == ["None"]


PROGRAM = """
import multiprocessing, sys

def where(name):
    import importlib
    return importlib.import_module(name).__file__

if __name__ == "__main__":
    names = ("fastllm", "fastllm.kernels", "fastllm.bench", "fastllm.training")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(where, names)
    assert found == [where(name) for name in names]
    print(*found)
"""


def test_a_script_beside_the_clone_imports_it_and_its_spawned_processes_do(beside):
    (beside[0] / "script.py").write_text(PROGRAM)
    found = [Path(file).resolve().parent for file in output(beside, "script.py")]
    assert found == [ROOT / "fastllm", ROOT / "kernels", ROOT / "bench", ROOT / "fastllm" / "training"]


def test_python_m_beside_the_clone(beside):
    assert output(beside, "-m", "fastllm", "--version")[-1] == fastllm.__version__


@pytest.mark.parametrize("mode", ["importlib", "prepend", "append"])
def test_pytest_beside_the_clone(beside, mode):
    (beside[0] / "test_it.py").write_text(f"def test_it():\n    {WHERE}\n    assert find_spec('fastllm').origin")
    output(beside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode", mode, "test_it.py")


EVERYWHERE = """
import os, pickle, sys

# A notebook has no file, and its folder comes first on sys.path.
sys.path.insert(0, "")
from fastllm import cli, functional
from fastllm.bench import results
from fastllm.kernels import tuned
from fastllm.models import ModelConfig

assert not hasattr(sys.modules["__main__"], "__file__")
# What pickles name is found again: a class, a function, and one of a package that lies beside fastllm.
for value in (ModelConfig, functional.layer_norm, results.Row, results.Row("a", "b", "c", "d", "e")):
    assert pickle.loads(pickle.dumps(value)) == value
where = {name: os.path.dirname(module.__file__) for name, module in sys.modules.items() if name.startswith("fastllm.")}
# One module for one file, whatever name it was imported by.
files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
mine = [os.path.realpath(file) for file in files if "fastllm" in file]
assert len(mine) == len(set(mine)), sorted(file for file in set(mine) if mine.count(file) > 1)
print(where["fastllm.bench.results"], where["fastllm.kernels.tuned"])
"""


def test_a_notebook_in_the_clone_and_what_it_pickles(beside):
    """kernels/ and bench/ are folders on its path too."""
    found = output(beside, "-c", EVERYWHERE, cwd=beside[0] / "fastllm")
    assert [Path(folder).resolve() for folder in found] == [ROOT / "bench", ROOT / "kernels"]


def test_every_entry_point_is_there():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    scripts = dict(re.findall(r'^(\w+) = "([\w.]+:\w+)"$', text.partition("[project.scripts]")[2], re.MULTILINE))
    assert scripts == {"fastllm": "fastllm.cli:main"}
    assert callable(importlib.import_module("fastllm.cli").main)
    for name in ("fastllm.__main__", "fastllm.build", "fastllm.bench.memory"):
        assert importlib.util.find_spec(name).origin.startswith(str(ROOT))


def test_another_checkout_on_the_path_is_taken_whole(beside, tmp_path):
    """Python's order stands: what comes on ``sys.path`` goes before, and its kernels are not another clone's."""
    for name in ("fastllm", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    code = "import fastllm.kernels; print(fastllm.__file__, fastllm.kernels.__file__)"
    found = output(beside, "-c", code, cwd=tmp_path)
    assert found == [str(tmp_path / name / "__init__.py") for name in ("fastllm", "kernels")]


def test_the_wheel_of_an_editable_install_holds_the_finder_alone(tmp_path, monkeypatch):
    """The backend's own part: setuptools' finder goes, ours comes, and the record tells of it."""
    module = backend()

    def theirs(wheel_directory, config_settings, metadata_directory):
        with zipfile.ZipFile(Path(wheel_directory, "x.whl"), "w") as file:
            for name in (
                "__editable___x_finder.py",
                "__editable__.x.pth",
                "x.dist-info/METADATA",
                "x.dist-info/RECORD",
            ):
                file.writestr(name, "text")
        return "x.whl"

    monkeypatch.setattr(module.build_meta, "build_editable", theirs)
    assert module.build_editable(str(tmp_path)) == "x.whl"
    with zipfile.ZipFile(tmp_path / "x.whl") as file:
        names, record = set(file.namelist()), file.read("x.dist-info/RECORD").decode()
    ours = {"__editable___fastllm_finder.py", "__editable___fastllm_finder.pth"}
    assert names == ours | {"x.dist-info/METADATA", "x.dist-info/RECORD"}
    assert {line.split(",")[0] for line in record.splitlines()} == names
