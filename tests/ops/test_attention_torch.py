"""Plain calls that torch's fused attention serves where it was measured faster: planted cases, on CPU."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_true
from torch.profiler import ProfilerActivity, profile

import fastllm
from fastllm import backends
from fastllm.extension import load as extension
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.ops.attention import torch_fused as module
from fastllm.ops.attention.attention import attention_reference
from fastllm.ops.attention.sdpa import OP

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("interpreter")]

DTYPE = torch.bfloat16


@pytest.fixture
def planted(monkeypatch):
    """CPU tensors count as an sm_90's, and there torch's flash attention was measured faster at head dim 16."""
    monkeypatch.setattr(module, "architecture", lambda device_type: 90)
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton",))
    for causal in (False, True):
        for direction in ("forward", "training"):
            monkeypatch.setitem(module.FASTER, (90, 16, causal, DTYPE, direction), "FLASH_ATTENTION")


def qkv(rows=24, cols=24, dim=16, heads_kv=2, dtype=DTYPE, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, rows, dim), (2, heads_kv, cols, dim), (2, heads_kv, cols, dim))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def served(call) -> str:
    """ "torch" or "ours", from the names in a profile."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        call()
    names = {event.key for event in record.key_averages()}
    ours = "fastllm::attention_fwd" in names
    assert ours != any(name.startswith("aten::_scaled_dot_product_flash_attention") for name in names)
    return "ours" if ours else "torch"


def test_measured_cases_go_to_torch(planted):
    q, k, v = qkv()
    assert served(lambda: attention(q, k, v)) == "torch"
    assert served(lambda: attention(q, k, v, causal=True)) == "torch"
    assert served(lambda: attention(q, k, v, scale=0.3)) == "torch"
    assert served(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)) == "torch"
    with torch.no_grad():
        assert served(lambda: attention(q, k, v)) == "torch"


@pytest.mark.parametrize(
    "options",
    [
        dict(window=(3, None)), dict(window=(None, 2)), dict(softcap=5.0), dict(alibi_slopes=torch.ones(2)),
        dict(sinks=torch.ones(2)), dict(bias=torch.zeros(24, 24)), dict(bias=torch.ones(24, 24, dtype=torch.bool)),
        dict(dropout_p=0.5), dict(return_lse=True),
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_features_stay_with_the_kernels(planted, options):
    q, k, v = qkv(grad=False)
    assert served(lambda: attention(q, k, v, **options)) == "ours"


def test_other_shapes_and_layouts_stay_with_the_kernels(planted):
    starts = torch.tensor([0, 24], dtype=torch.int32)
    q, k, v = qkv(grad=False)
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    assert served(lambda: attention(*flat, cu_seqlens_q=starts, cu_seqlens_k=starts)) == "ours"
    assert served(lambda: attention(*qkv(16, 24), causal=True)) == "ours"
    assert served(lambda: attention(*qkv(dim=24))) == "ours"
    assert served(lambda: attention(*qkv(heads_kv=1))) == "ours"
    assert served(lambda: attention(*qkv(dtype=torch.float16))) == "ours"
    assert served(lambda: attention(q, k, v[..., :8])) == "ours"
    odd = torch.randn(2, 2, 24, 20).to(DTYPE)[..., 1:17]
    assert served(lambda: attention(odd, k, v)) == "ours"
    assert served(lambda: scaled_dot_product_attention(q, k, v, dropout_p=0.5)) == "ours"
    assert served(lambda: scaled_dot_product_attention(q, k, v, torch.zeros(24, 24))) == "ours"


def test_what_was_asked_for_comes_first(planted, monkeypatch):
    q, k, v = qkv()
    with fastllm.backend("triton"):
        assert served(lambda: attention(q, k, v)) == "ours"
    torch.use_deterministic_algorithms(True)
    try:
        assert served(lambda: attention(q, k, v)) == "ours"
        with torch.no_grad():
            assert served(lambda: attention(q, k, v)) == "torch"
    finally:
        torch.use_deterministic_algorithms(False)
    # Faster forward alone is no reason where a gradient will be asked for.
    monkeypatch.delitem(module.FASTER, (90, 16, False, DTYPE, "training"))
    assert served(lambda: attention(q, k, v)) == "ours"
    monkeypatch.setattr(module, "architecture", lambda device_type: 80)
    assert served(lambda: attention(*qkv(grad=False))) == "ours"


@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients(planted, causal):
    def run(function, dtype):
        tensors = [x.detach().to(dtype).requires_grad_() for x in qkv()]
        out = function(*tensors, causal=causal)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        return out, *torch.autograd.grad(out, tensors, upstream)

    truth, plain, got = run(attention_reference, torch.double), run(attention_reference, DTYPE), run(attention, DTYPE)
    for true, stick, mine in zip(truth, plain, got, strict=True):
        assert_as_true(mine, true, stick, DTYPE, "torch's")


def test_a_compiled_call_stays_whole_and_ours(planted):
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), backend="aot_eager", fullgraph=True)
    compiled(q, k, v)
    assert served(lambda: compiled(q, k, v)) == "ours"


def test_info_says_which(planted, monkeypatch):
    said = fastllm.OPS["attention"].exception("cuda")
    assert "head dim 16 causal bfloat16 training: FLASH_ATTENTION" in said
    monkeypatch.setattr(module, "FASTER", {})
    assert fastllm.OPS["attention"].exception("cuda").endswith("faster in torch's fused attention on sm_90")
    with fastllm.backend("triton"):
        assert fastllm.OPS["attention"].exception("cuda") is None


def test_without_matrix_units_bf16_on_a_cpu_is_torchs_and_info_says_nothing_of_them(monkeypatch):
    monkeypatch.setattr(extension, "_matrix_units", False)
    q, k, v = qkv()
    padding = (torch.arange(24) < torch.tensor([24, 9])[:, None])[:, None, None, :]
    for function, ours, torchs in (
        (scaled_dot_product_attention, {"is_causal": True}, {"is_causal": True}),
        (attention, {"causal": True}, {"is_causal": True}),
        (scaled_dot_product_attention, {"attn_mask": padding}, {"attn_mask": padding}),
    ):
        got, expected = function(q, k, v, **ours), F.scaled_dot_product_attention(q, k, v, **torchs)
        grads = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (got, expected)]
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    lines = [line for line in fastllm.info().splitlines() if line.split()[:1] in (["attention"], [OP])]
    assert len(lines) == 2
    assert not any("AMX" in line for line in lines)
