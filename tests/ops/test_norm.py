"""What is peculiar to the norms: wide rows, dropout, the residual stream's dtype, weight offset, errors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import assert_all_as_true, assert_as_true, backend_fixture, copy, leaves, outputs, run, truth_of
from thorough import THOROUGH

import fastllm
from fastllm import OPS
from fastllm.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastllm.kernels import device as kernels_device
from fastllm.kernels import launch as _launch
from fastllm.kernels.norm import backward as _norm_backward
from fastllm.kernels.norm import forward as _norm
from fastllm.kernels.norm import long_row as _norm_row
from fastllm.registry import Sample

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
ADDS = (add_layer_norm, add_rms_norm)

backend = backend_fixture("eager", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_rows_past_what_registers_hold(name, dtype, monkeypatch, poisoned_memory):
    op = OPS[name]
    torch.manual_seed(1)
    samples = [copy(s) for s in op.samples(DEVICE, dtype) if s.args[0].numel() < 1500]
    monkeypatch.setattr(_norm, "FWD_ROW", 0)
    monkeypatch.setattr(_norm, "BLOCKED_COLS", 32)
    monkeypatch.setattr(_norm_backward, "BWD_ROW", 0)
    monkeypatch.setattr(_norm_backward, "WIDE_TILE", (2, 32))
    for sample in samples:
        yardstick = run(op.function, copy(sample), "eager")
        got = run(op.function, copy(sample), "triton")
        assert_all_as_true(got, truth_of(op, sample), yardstick, dtype, f"{name}/{sample.name}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_rows_that_stay_16_bit_in_registers(name, dtype, monkeypatch, poisoned_memory):
    op, packed = OPS[name], []
    monkeypatch.setattr(_norm, "FWD_ROW", 80)
    real = _norm.norm_fwd_packed
    monkeypatch.setattr(_norm, "norm_fwd_packed", lambda *args: (packed.append(args), real(*args)))

    def made(*shape):
        return torch.randn(shape, device=DEVICE).to(dtype)

    for cols in (82, 130, 160):
        wide = [made(5, cols + 6) for _ in range(1 + name.startswith("add"))]
        for inputs in ([t[:, 4 : 4 + cols] for t in wide], [t[:3, :cols].contiguous() for t in wide]):
            options = {"weight": made(cols), "weight_offset": 0.5} | (
                {"bias": made(cols)} if name.endswith("layer_norm") else {}
            )
            sample = Sample("", (*inputs, (cols,)), options)
            truth = outputs(op.reference(*copy(sample, torch.float64).args, **copy(sample, torch.float64).kwargs))
            yardstick, _ = run(op.function, sample, "eager", grads=False)
            got, _ = run(op.function, sample, "triton", grads=False)
            for a, b, c in zip(got, truth, yardstick, strict=True):
                assert_as_true(a, b, c, dtype, f"{name} {cols}")
    assert len(packed) == 6
    run(op.function, Sample("", (*(t[:, 1:83] for t in wide), (82,))), "triton", grads=False)
    assert len(packed) == 6  # rows that begin at an odd element go another way
    run(op.function, Sample("", (*(made(5, 85)[:, :82] for _ in wide), (82,))), "triton", grads=False)
    assert len(packed) == 6  # and those of which every second one does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_rows_shared_by_a_cluster(name, dtype, monkeypatch, poisoned_memory):
    op, seen = OPS[name], []
    monkeypatch.setattr(_norm, "FWD_ROW", 8)
    monkeypatch.setattr(_norm_backward, "BWD_ROW", 8)
    for module, launcher in ((_norm, "norm_fwd_row"), (_norm_backward, "norm_bwd_row")):
        real = getattr(module, launcher)
        monkeypatch.setattr(
            module, launcher, lambda *args, real=real: (seen.append((real.__name__, args[1])), real(*args))
        )
    chosen = ("5x63", "no_parameters", "packed_heads", "weight_offset", "bias_only", "wide_residual")
    for sample in (copy(s) for s in op.samples(DEVICE, dtype) if s.name in chosen):
        yardstick = run(op.function, copy(sample), "eager")
        got = run(op.function, copy(sample), "triton")
        assert_all_as_true(got, truth_of(op, sample), yardstick, dtype, f"{name}/{sample.name}")
    assert {("norm_fwd_row", 8), ("norm_bwd_row", 8), ("norm_bwd_row", 2)} <= set(seen)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=THOROUGH)])
@pytest.mark.parametrize("name", NORMS)
def test_long_rows_segment_by_segment(name, dtype, monkeypatch, poisoned_memory):
    op, add, seen = OPS[name], name.startswith("add"), []
    for constant, value in dict(LONG=64, UNALIGNED_LONG=64, SEGMENT=64, LOADED_FIRST=128).items():
        monkeypatch.setattr(_norm_row, constant, value)
    for module, launcher in ((_norm, "norm_fwd_row"), (_norm_backward, "norm_bwd_row")):
        real = getattr(module, launcher)
        monkeypatch.setattr(module, launcher, lambda *args, real=real: (seen.append(real.__name__), real(*args)))

    def made(*shape, dtype=dtype):
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    # 2 and 5 segments of 64 columns, the last one full; 4, the last one short; 2 of 256 where rows are not aligned.
    for cols, wide in ((128, False), (320, True), (208, False), (500, True)):
        # The interpreter has 4 processors: programs of 3 rows and one of 4.
        inputs = [made(13, cols + 3)[:, 1 : 1 + cols] for _ in range(1 + add)]
        if add and wide:
            inputs[1] = made(13, cols, dtype=torch.float32)
        options = {"weight": made(cols), "weight_offset": 0.5}
        if wide:
            options = {"weight": made(cols, dtype=torch.float32)}
        if name.endswith("layer_norm"):
            options["bias"] = made(cols)
        sample = Sample("", (*inputs, (cols,)), options)
        yardstick = run(op.function, copy(sample), "eager")
        got = run(op.function, copy(sample), "triton")
        assert_all_as_true(got, truth_of(op, sample), yardstick, dtype, f"{name}/{cols}")
    assert seen == ["norm_fwd_row", "norm_bwd_row"] * 4


@pytest.mark.runs_on("anywhere")
def test_clusters_are_for_gpus_that_have_them(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(_launch, "TRITON", (3, 8))
    for arch, blocks in ((80, 0), (90, 2), (100, 2)):
        monkeypatch.setattr(kernels_device, "_gpu", lambda index, arch=arch: kernels_device.GPUS[arch])
        assert _launch.cluster_blocks(cuda, 12288, 8192) == blocks
    assert [_launch.cluster_blocks(cuda, n, 8192) for n in (8193, 32768, 65536, 65537)] == [2, 4, 8, 0]
    monkeypatch.setattr(_launch, "TRITON", (3, 7))
    assert _launch.cluster_blocks(cuda, 12288, 8192) == 0


def test_a_row_at_the_edge_of_each_kernel():
    edges = (_norm_row.UNALIGNED_LONG + 1, _norm_row.LONG, _norm_row.LONG + 16, _norm_backward.BWD_ROW)
    for cols in (*edges, _norm.FWD_ROW, _norm.FWD_ROW + 1):
        x = torch.randn(2, cols, device=DEVICE, requires_grad=True)
        dy = torch.randn(2, cols, device=DEVICE)
        with fastllm.backend("triton"):
            (mine,) = torch.autograd.grad(rms_norm(x, (cols,)), x, dy)
        (theirs,) = torch.autograd.grad(F.rms_norm(x, (cols,)), x, dy)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("function", ADDS)
@pytest.mark.parametrize("bwd", ["tile", "long", "cluster", "none"])
def test_each_upstream_gradient_is_read_by_its_own_strides(function, bwd, monkeypatch):
    cols = 96
    monkeypatch.setattr(_norm_backward, "BWD_ROW", {"cluster": 32, "none": 0}.get(bwd, 4096))
    monkeypatch.setattr(_norm_backward, "is_long", lambda _: bwd == "long")
    monkeypatch.setattr(_norm_row, "SEGMENT", 32)
    leaves = [torch.randn(6, cols, device=DEVICE, requires_grad=True) for _ in range(2)]
    apart, alike = torch.randn(12, cols, device=DEVICE)[::2], torch.randn(cols, device=DEVICE).expand(6, cols)
    for upstream in ((apart, alike), (alike, apart)):
        found = []
        for backend in ("eager", "triton"):
            with fastllm.backend(backend):
                found.append(torch.autograd.grad(function(*leaves, (cols,)), leaves, upstream))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("function", ADDS)
# (forward, backward), in other tiles each: rows of a tile, long ones, ones of a cluster, and none that registers hold.
@pytest.mark.parametrize(("fwd", "bwd"), [("tile", "long"), ("long", "cluster"), ("cluster", "tile"), ("none", "none")])
def test_dropout_is_the_same_in_both_directions(function, fwd, bwd, monkeypatch):
    cols, row = 96, {"tile": 4096, "long": 4096, "cluster": 32, "none": 0}
    monkeypatch.setattr(_norm, "FWD_ROW", row[fwd])
    monkeypatch.setattr(_norm_backward, "BWD_ROW", row[bwd])
    monkeypatch.setattr(_norm, "is_long", lambda _: fwd == "long")
    monkeypatch.setattr(_norm_backward, "is_long", lambda _: bwd == "long")
    monkeypatch.setattr(_norm_row, "SEGMENT", 32)
    x = torch.rand(64, cols, device=DEVICE).add_(1).requires_grad_()
    residual = torch.randn(64, cols, device=DEVICE, requires_grad=True)
    weight = torch.rand(cols, device=DEVICE, requires_grad=True)
    p = 0.25
    with fastllm.backend("triton"):
        y, h = function(x, residual, (cols,), weight, dropout_p=p)
        kept = (h - residual).abs() > 0.5
        dy, dh = torch.randn_like(y), torch.randn_like(h)
        got = torch.autograd.grad((y, h), (x, residual, weight), (dy, dh))
    # 6144 draws: the share kept has a standard deviation below 0.6%.
    assert abs(kept.double().mean() - (1 - p)) < 0.03
    branch = torch.where(kept, x / (1 - p), 0)
    with fastllm.backend("eager"):
        y_true, h_true = function(branch, residual, (cols,), weight)
        expected = torch.autograd.grad((y_true, h_true), (x, residual, weight), (dy, dh))
    torch.testing.assert_close(y, y_true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, h_true)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", ADDS)
def test_dropout_follows_the_seed_and_the_mode(function):
    x, residual = torch.rand(8, 40, device=DEVICE) + 1, torch.zeros(8, 40, device=DEVICE)
    with fastllm.backend("triton"):
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(function(x, residual, (40,), dropout_p=0.5)[1])
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


# The extension has CPU code alone for it.
@pytest.mark.parametrize("kernels", ["triton", pytest.param("native", marks=pytest.mark.runs_on("interpreter"))])
@pytest.mark.parametrize("function", ADDS)
def test_gradients_through_dropout_have_gradients(function, kernels):
    x, residual, weight = (torch.randn(n, 40, device=DEVICE).squeeze(0).requires_grad_() for n in (6, 6, 1))

    def to_second_order(y, h):
        grads = torch.autograd.grad(y.sin().sum() + h.square().sum(), (x, residual, weight), create_graph=True)
        return *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (x, residual, weight))

    with fastllm.backend(kernels):
        y, h = function(x, residual, (40,), weight, dropout_p=0.4)
        mine = to_second_order(y, h)
    branch = torch.where((h - residual).abs() > 0, x / 0.6, 0)
    with fastllm.backend("eager"):
        expected = to_second_order(*function(branch, residual, (40,), weight))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_modules_drop_out_in_training_only(backend):
    for cls, plain in ((fastllm.nn.AddLayerNorm, torch.nn.LayerNorm), (fastllm.nn.AddRMSNorm, torch.nn.RMSNorm)):
        module = cls(40, dropout_p=0.5).to(DEVICE)
        assert "dropout_p=0.5" in repr(module)
        x, residual = torch.rand(8, 40, device=DEVICE) + 1, torch.zeros(8, 40, device=DEVICE)
        assert (module(x, residual)[1] == 0).any()
        y, h = module.eval()(x, residual)
        torch.testing.assert_close(h, x)
        torch.testing.assert_close(y, plain.forward(module, x))
        with pytest.raises(ValueError, match=f"{cls.__name__}: dropout_p must be in"):
            cls(40, dropout_p=1.0)


def test_the_residual_stream_keeps_its_dtype(backend):
    x = torch.randn(3, 32, device=DEVICE).bfloat16().requires_grad_()
    residual = torch.randn(3, 32, device=DEVICE, requires_grad=True)
    for function in ADDS:
        y, h = function(x, residual, (32,))
        assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(h, residual + x)
        (y.float().sum() + h.sum()).backward()
        assert (x.grad.dtype, residual.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kernels", ["triton", pytest.param("native", marks=pytest.mark.runs_on("interpreter"))])
@pytest.mark.parametrize("function", ADDS)
def test_gradients_beside_a_wider_residual_have_gradients(function, kernels):
    """The gradient of y is in the branch's dtype, that of h in the residual's."""
    x, residual = torch.randn(5, 32, device=DEVICE).bfloat16(), torch.randn(5, 32, device=DEVICE, requires_grad=True)
    found = {}
    for backend in ("eager", kernels):
        with fastllm.backend(backend):
            y, h = function(x, residual, (32,), eps=1e-2)
            (first,) = torch.autograd.grad(y.float().sin().sum() + h.sum(), residual, create_graph=True)
            found[backend] = first, *torch.autograd.grad(first.square().sum(), residual)
    for got, expected in zip(found[kernels], found["eager"], strict=True):
        # Measured 1e-6 in the interpreter. On a GPU a y that is rounded to the next bf16 number moves its gradient.
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_parameters_of_several_dimensions_may_have_strides(backend):
    """Flattened, their elements are evenly apart, and not side by side."""
    x, w = torch.randn(3, 5, 2, device=DEVICE), torch.randn(5, 2, 2, device=DEVICE)[..., 1].requires_grad_()
    found = []
    for weight in (w, w.detach().contiguous().requires_grad_()):
        y = OPS["layer_norm"].function(x, (5, 2), weight, weight)
        found.append((y, *torch.autograd.grad(y.square().sum(), weight)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_gradient(backend, used):
    for name in ("add_layer_norm", "add_rms_norm"):
        x, residual, w = (torch.randn(4, 24, device=DEVICE, requires_grad=True) for _ in range(3))
        given = torch.randn(4, 24, device=DEVICE)
        got = torch.autograd.grad(
            OPS[name].function(x, residual, (24,), w[0])[used], (x, residual, w), given, allow_unused=True
        )
        expected = torch.autograd.grad(
            OPS[name].reference(x, residual, (24,), w[0])[used], (x, residual, w), given, allow_unused=True
        )
        for a, b in zip(got, expected, strict=True):
            assert a is not None or b is None
            if a is not None:
                torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_residual_chain_and_post_norm_residual(backend):
    """h + norm(h): the incoming gradient is used twice, and must not have been written to."""
    h = torch.randn(5, 32, device=DEVICE, requires_grad=True)
    weight = torch.rand(32, device=DEVICE, requires_grad=True)
    (h + rms_norm(h, (32,), weight)).square().mean().backward()
    mine = h.grad.clone(), weight.grad.clone()
    h.grad = weight.grad = None
    (h + F.rms_norm(h, (32,), weight)).square().mean().backward()
    torch.testing.assert_close(mine, (h.grad, weight.grad))


def test_weight_offset_is_added_in_fp32(backend):
    # In bf16 1 + 2^-9 is 1: added after rounding, the small weights would vanish.
    weight = torch.full((32,), 2.0**-9, device=DEVICE).bfloat16()
    x = torch.randn(4, 32, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, (32,), weight, weight_offset=1.0), F.rms_norm(x, (32,)) * (1 + 2.0**-9))
    torch.testing.assert_close(layer_norm(x, (32,), weight, weight_offset=1.0), F.layer_norm(x, (32,)) * (1 + 2.0**-9))


def test_a_row_does_not_depend_on_its_batch():
    with fastllm.backend("triton"):
        x, residual = torch.randn(37, 96, device=DEVICE), torch.randn(37, 96, device=DEVICE)
        for function in ADDS:
            whole = function(x, residual, (96,))
            for rows in (slice(0, 1), slice(20, 37)):
                for a, b in zip(function(x[rows], residual[rows], (96,)), whole, strict=True):
                    assert torch.equal(a, b[rows])


@pytest.mark.runs_on("anywhere")
def test_heads_in_a_packed_projection_are_read_where_they_lie():
    from fastllm.kernels.launch import RowView

    packed = torch.randn(5, 3, 4, 16)
    rows = RowView(packed[:, 1], 16)
    assert rows.data.data_ptr() == packed[:, 1].data_ptr()
    assert rows.layout == (4, 192, 16)
    assert RowView(torch.randn(6, 4, 2, 8).permute(1, 0, 2, 3)[:, ::2], 8).data.is_contiguous()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
# torch's own has no RMS norm of strided ones
@pytest.mark.parametrize(
    ("function", "layout"), [(layer_norm, torch.strided), (layer_norm, torch.jagged), (rms_norm, torch.jagged)]
)
def test_nested_tensors_are_torchs(function, layout):
    rows = [torch.randn(n, 8, device=DEVICE) for n in (2, 3)]
    weights = torch.randn(1 if function is rms_norm else 2, 8, device=DEVICE)
    got = function(torch.nested.nested_tensor(rows, layout=layout), (8,), *weights)
    for mine, row in zip(got.unbind(), rows, strict=True):
        torch.testing.assert_close(mine, function(row, (8,), *weights))
    if layout == torch.jagged:
        y, _ = add_rms_norm(*[torch.nested.nested_tensor(rows, layout=layout)] * 2, (8,))
        torch.testing.assert_close(y.unbind()[1], rms_norm(rows[1] * 2, (8,)))
        refused = "sparse or nested" if DEVICE.type == "cpu" else ""
        with fastllm.backend("triton"), pytest.raises(fastllm.BackendError, match=refused):
            add_rms_norm(*[torch.nested.nested_tensor(rows, layout=layout)] * 2, (8,))


X = torch.zeros(2, 8)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("function", ADDS)
@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((X, X[:1], (8,)), {}, ValueError, r"residual.*\[2, 8\].*\[1, 8\]"),
        ((X, 3, (8,)), {}, TypeError, "residual.*int"),
        ((X, None, (8,)), {}, TypeError, "residual.*None"),
        ((X, X, (8,), [1.0] * 8), {}, TypeError, "weight.*list"),
        ((X, X, (8,), X[0].long()), {}, TypeError, "weight.*int64"),
        ((X, X, (8.0,)), {}, TypeError, r"normalized_shape.*\(8.0,\)"),
        ((X, X, None), {}, TypeError, "normalized_shape.*None"),
        ((X, X, (8,)), {"eps": "a"}, TypeError, "eps.*'a'"),
        ((X, X.long(), (8,)), {}, TypeError, "residual.*int64"),
        ((X.long(), X, (8,)), {}, TypeError, "input.*int64"),
        ((X, X.to("meta"), (8,)), {}, ValueError, "residual is on meta"),
        ((X, X, (7,)), {}, ValueError, r"normalized_shape \[7\]"),
        ((X[0, 0], X[0, 0], ()), {}, ValueError, "normalized_shape must name"),
        ((X, X, (8,), X), {}, ValueError, "weight"),
        ((X, X, (8,)), {"dropout_p": 1.0}, ValueError, "dropout_p.*1.0"),
        ((X, X, (8,)), {"weight_offset": float("inf")}, ValueError, "weight_offset"),
    ],
)
def test_errors_name_what_is_wrong(function, args, options, error, words):
    with pytest.raises(error, match=f"{function.__name__}: .*{words}"):
        function(*args, **options)


@pytest.mark.parametrize("name", NORMS)
def test_samples_leave_their_inputs_alone(name):
    op = OPS[name]
    for sample in list(op.samples(DEVICE, torch.float32))[3:6]:
        sample = copy(sample)
        before = [t.detach().clone() for t in leaves(sample)]
        with fastllm.backend("triton"):
            sum(o.sum() for o in outputs(op.function(*sample.args, **sample.kwargs))).backward()
        for now, then in zip(leaves(sample), before, strict=True):
            assert torch.equal(now, then)
