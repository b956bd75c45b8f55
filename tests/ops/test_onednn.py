"""oneDNN's products of a linear layer in blocks of classes: the numbers, also of views, and who is asked."""

import math

import pytest
import torch
from onednn_products import NEEDS_ONEDNN

from fastllm import cpu
from fastllm.functional import linear_log_probs
from fastllm.ops.cross_entropy.products import add_product, logits_into, rows_gradient_into
from fastllm.ops.shared import onednn

pytestmark = [
    pytest.mark.runs_on("anywhere"),
    pytest.mark.cpu_level,
    NEEDS_ONEDNN,
]
N, D, V = 70, 48, 2100


@pytest.fixture
def _served(monkeypatch):
    """oneDNN is asked for all products, whatever this CPU is."""
    monkeypatch.setattr(onednn, "_fewest", lambda: 1)
    monkeypatch.setattr(onednn, "_faster_for_all", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    seen, real = [], onednn.multiplied
    monkeypatch.setattr(
        onednn, "multiplied", lambda x, weight, *bias: seen.append(len(weight)) or real(x, weight, *bias)
    )
    return seen


@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_fp64(calls, bias):
    x, w, z = torch.randn(2 * N, D)[::2], torch.randn(V, D), torch.randn(N, V + 3)[:, :V]
    b = torch.randn(V) if bias else None
    out, rows, total = torch.empty(N, V + 1)[:, :V], torch.empty(N, D), torch.full((V, D), float("nan"))
    logits_into(x, w, b, out)
    rows_gradient_into(z, w, rows)
    for first in (True, False):
        add_product(total, z, x, "native", first)
    assert calls == [1024, 1024, 52] + [D] * 9
    wide = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    torch.testing.assert_close(out.double(), wide, rtol=0, atol=2e-5)
    torch.testing.assert_close(rows.double(), z.double() @ w.double(), rtol=0, atol=4e-4)
    torch.testing.assert_close(total.double(), 2 * (z.double().t() @ x.double()), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("whole", [0, V * D])
def test_outputs_are_those_of_fp64_whole_or_in_blocks(monkeypatch, calls, whole):
    monkeypatch.setattr(onednn, "WHOLE", whole)
    x, w = torch.randn(2 * N, D)[::2], torch.randn(V, D)
    out = onednn.onednn_outputs(x, w)
    assert calls == ([V] if whole else [1024, 1024, 52])
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), x.double() @ w.double().t(), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("_served")
def test_log_probabilities_and_gradients_are_those_of_mkls_products(monkeypatch, calls):
    x, w, y = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.randint(V, (N,))

    def both():
        log_probs = linear_log_probs(x, w, y, max_workspace_mb=0.25)
        return log_probs, *torch.autograd.grad((log_probs * torch.arange(N)).sum(), (x, w))

    mine = both()
    assert calls
    monkeypatch.setattr(onednn, "_fewest", lambda: math.inf)
    for a, e in zip(mine, both(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("maker", "level", "served", "outputs"),
    [
        ("AuthenticAMD", "avx512", True, True),
        ("AuthenticAMD", "avx2", False, True),
        ("AuthenticAMD", "baseline", False, False),
        ("GenuineIntel", "avx512", False, False),
        ("GenuineIntel", "avx2", False, False),
    ],
)
def test_only_cpus_that_were_measured_are_served(monkeypatch, maker, level, served, outputs):
    monkeypatch.setattr(cpu, "maker", lambda: maker)
    monkeypatch.setattr(cpu, "level", lambda: level)
    monkeypatch.setattr(onednn, "_is_measured", onednn._is_measured.__wrapped__)
    large = torch.randn(4096, 64), torch.randn(1024, 64)
    for serves, expected in ((onednn.onednn_serves, served), (onednn.onednn_serves_rows, outputs)):
        assert serves(*large) == (expected and torch.backends.mkl.is_available())
        assert not serves(large[0][:8], large[1])
        assert not serves(*(t.double() for t in large))
        torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags() warns of GPUs
        try:
            assert not serves(*large)
        finally:
            torch._C._set_mkldnn_enabled(True)
