"""``fastllm bench export``: what it writes does what other benchmarks' runners ask, and their own loaders take it."""

import importlib
import importlib.util
import json
import sys
import types

import pytest
import torch

from fastllm.bench import cases, command, export, exported
from fastllm.bench.norms import norm_shapes
from fastllm.bench.results import Row, Run
from fastllm.bench.scores import write
from fastllm.registry import Sample


def _ids(device, dtype):
    return Sample("", (torch.arange(5, device=device), torch.randn(7, 4, device=device, dtype=dtype)))


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """One small shape for each of three ops: a plain one, one with two results, one with integers."""
    size = {"Small 3x24": (3, 24)}
    small = {
        "layer_norm": norm_shapes(bias=True, of=size),
        "add_rms_norm": norm_shapes(bias=False, residual=True, of=size),
        "embedding": {"Small 5 ids, 7x4": _ids},
    }
    for op, shapes in small.items():
        monkeypatch.setattr(importlib.import_module(f"fastllm.bench.{op}"), "cpu_shapes", shapes, raising=False)
    return list(small)


def _export(tmp_path, kind, *arguments):
    folder = tmp_path / kind
    assert command.main(["export", kind, *arguments, "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def _class(script):
    spec = importlib.util.spec_from_file_location("benchmark_module", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == "benchmark_module")


def test_kernels_by_the_runners_steps(tmp_path, small_shapes, monkeypatch, request):
    """A new object, its set-up, a call, and the comparison, which covers every result; a wrong one is seen."""
    theirs = types.ModuleType("kernels.benchmark")
    theirs.Benchmark = type("Benchmark", (), {"__init__": lambda self: vars(self).update(kernel=None)})
    monkeypatch.setitem(sys.modules, "kernels", types.ModuleType("kernels"))
    monkeypatch.setitem(sys.modules, "kernels.benchmark", theirs)
    sys.modules.pop("fastllm.bench.kernels_benchmark", None)
    request.addfinalizer(lambda: sys.modules.pop("fastllm.bench.kernels_benchmark", None))
    folder = _export(tmp_path, "kernels", *small_shapes)
    spec = importlib.util.spec_from_file_location("theirs", folder / "build" / "torch-universal" / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    found = []
    for script in sorted((folder / "benchmarks").glob("benchmark*.py")):
        benchmark = _class(script)
        for method in [name for name in dir(benchmark) if name.startswith("benchmark_")]:
            workload = method.removeprefix("benchmark_")
            instance = benchmark()
            instance.kernel, instance.device = kernel, "cpu"
            getattr(instance, f"setup_{workload}")()
            getattr(instance, method)()
            expected = getattr(instance, f"verify_{workload}")()
            assert torch.allclose(instance.out, expected, atol=1e-2)
            instance._results[-1] = instance._results[-1] + 1
            assert not torch.allclose(instance.out, expected, atol=1e-2)
            found.append((instance.op, workload))
    assert found == [("add_rms_norm", "small_3x24"), ("embedding", "small_5_ids_7x4"), ("layer_norm", "small_3x24")]


def test_kernels_runner_takes_it(tmp_path, small_shapes):
    """The package's own runner finds the scripts, loads the kernel from the folder, and verifies each workload."""
    try:
        runner = importlib.import_module("kernels.cli.benchmark")
    except ImportError as error:
        pytest.skip(f"the package kernels is not installed; .ci/run installs it ({error})")
    folder = _export(tmp_path, "kernels", *small_shapes)
    found = {}
    for script in runner.discover_benchmark_scripts(str(folder), folder):
        (benchmark,) = runner.discover_benchmark_classes(script, folder)
        results, _ = runner.run_benchmark_class(benchmark, 2, 1, str(folder), True, "local")
        found[benchmark.op] = [(name, result.verified) for name, result in results.items()]
    assert found == {
        "add_rms_norm": [("small_3x24", True)],
        "embedding": [("small_5_ids_7x4", True)],
        "layer_norm": [("small_3x24", True)],
    }


def _run(file):
    rows = [
        Row("layer_norm", "Small 3x24", "float32", "forward", provider, samples=[seconds] * 6)
        for provider, seconds in (("fastllm", 1e-3), ("eager", 3e-3), ("torch.compile", 2e-3))
    ]
    rates = {"copy": 1e9, "matrix": 1e9}
    where = {"device": "a CPU", "date": "2026-01-02T03:04:05+00:00", "packages": {"torch": "2"}, "rates": rates}
    write(Run(where, rows), file)


@pytest.fixture
def data_set(tmp_path, small_shapes):
    _run(tmp_path / "bench.json")
    return _export(tmp_path, "flashinfer", *small_shapes, "--run", str(tmp_path / "bench.json"))


def _program(text):
    names = {}
    exec(text, names)
    return names["run"]


def test_flashinfer_programs_and_traces(data_set):
    """Definitions say what the programs take and give; the trace has the run's times, and errors that were measured."""
    for file in sorted(data_set.glob("definitions/*/*.json")):
        definition = json.loads(file.read_text())
        solution = json.loads((data_set / "solutions" / file.parent.name / file.name).read_text())
        (line,) = (data_set / "workloads" / file.parent.name / f"{file.stem}.jsonl").read_text().splitlines()
        workload = json.loads(line)["workload"]
        assert workload["inputs"].keys() == definition["inputs"].keys()

        def shape(spec, axes=definition["axes"]):
            return [axes[axis]["value"] for axis in spec["shape"]]

        inputs = []
        for name, spec in definition["inputs"].items():
            dtype = getattr(torch, spec["dtype"])
            kept = workload["inputs"][name]
            assert (kept["type"] == "random") == dtype.is_floating_point
            if kept["type"] == "random":
                inputs.append(torch.randn(shape(spec), dtype=dtype))
            else:
                loaded = importlib.import_module("safetensors.torch").load_file(data_set / kept["path"])
                inputs.append(loaded[kept["tensor_key"]])
        sample = Sample("", tuple(inputs))
        ours = cases.forward(_program(solution["sources"][0]["content"]), sample)
        theirs = cases.forward(_program(definition["reference"]), sample)
        assert [list(t.shape) for t in ours] == [shape(spec) for spec in definition["outputs"].values()]
        torch.testing.assert_close(ours, theirs)
    (trace,) = [json.loads(file.read_text()) for file in data_set.glob("traces/*/*.jsonl")]
    assert trace["solution"] == "fastllm_layer_norm_small_3x24_float32"
    assert trace["evaluation"]["performance"] == {
        "latency_ms": 1.0, "reference_latency_ms": 3.0, "speedup_factor": 3.0,
    }  # fmt: skip
    assert 0 < trace["evaluation"]["correctness"]["max_absolute_error"] < 1e-5


def test_flashinfer_bench_loads_it(data_set):
    """FlashInfer-Bench's own loader, and its builder of the programs."""
    data = pytest.importorskip("flashinfer_bench.data", reason="flashinfer-bench is not installed; .ci/run installs it")
    found = data.TraceSet.from_path(str(data_set))
    assert found.summary()["passed"] == 1
    assert len(found.definitions) == len(found.workloads) == len(found.solutions) == 3
    registry = importlib.import_module("flashinfer_bench.compile").BuilderRegistry.get_instance()
    x = torch.randn(3, 24), torch.ones(24), torch.zeros(24)
    name = "layer_norm_small_3x24_float32"
    ours, theirs = registry.build(found.definitions[name], found.solutions[name][0]), found.definitions[name]
    torch.testing.assert_close(ours(*x), registry.build_reference(theirs)(*x))


def test_refused(tmp_path, capsys):
    """A folder that has files, a run for a format without times, no such shape; dropout is left out by name."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, words in (
        (["flashinfer", "layer_norm", "--out", str(tmp_path / "full")], "is not an empty folder"),
        (["kernels", "--run", "x.json", "--out", str(tmp_path / "new")], "--run: the format kernels has no times"),
        (["kernels", "layer_norm", "--shape", "huge", "--out", str(tmp_path / "new")], "--shape: no shape"),
    ):
        with pytest.raises(SystemExit):
            export.main(arguments)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    ops = cases.selected(["attention"])
    found, left_out = exported.calls(ops, "float32", torch.device("cuda"), ["dropout"])
    assert not found
    assert len(left_out) == 1
