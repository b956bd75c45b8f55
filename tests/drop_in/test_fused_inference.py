"""torch.nn.TransformerEncoder and MultiheadAttention in evaluation: PyTorch's fused inference stays where it serves."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm import functional
from fastllm.drop_in import mode


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(16, options.pop("heads", 2), 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=not options)


class _Encoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.encoder = nn.Embedding(8, 16), nn.Embedding(8, 16), _encoder()

    def forward(self, ids):
        return self.encoder(self.words(ids) + self.places(torch.arange(ids.shape[1])))


def _first(x):
    return x[0] if isinstance(x, tuple) else x


FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
CLASSES = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
PADDING = torch.arange(5) >= torch.tensor([[5], [3]])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (_encoder, {}),
        (_encoder, dict(src_key_padding_mask=PADDING)),
        (_encoder, dict(mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True)),
        (lambda: _encoder(norm_first=True), {}),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), dict(src_key_padding_mask=PADDING)),
        (lambda: nn.MultiheadAttention(16, 2, batch_first=True), {}),
        (lambda: nn.MultiheadAttention(16, 2, batch_first=True), dict(key_padding_mask=PADDING, need_weights=False)),
        (_Encoding, {}),
    ],
)
@pytest.mark.parametrize("where", ["accelerated", "accelerate", "both"])
def test_torchs_fused_inference_is_taken(build, options, where, monkeypatch):
    fused = []
    for name in FUSED:
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _f=function: fused.append(1) or _f(*args))
    model = build().eval()
    x = torch.randint(8, (2, 5)) if isinstance(model, _Encoding) else torch.randn(2, 5, 16)
    args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    alone = where != "accelerated" and isinstance(model, nn.MultiheadAttention) and not options.get("need_weights", 1)
    forwards = [cls.forward for cls in CLASSES]
    with torch.no_grad():
        want = _first(model(*args, **options))
        if where != "accelerated":
            fastllm.accelerate(model)
        with fastllm.accelerated() if where != "accelerate" else contextlib.nullcontext():
            got = _first(model(*args, **options))
    torch.testing.assert_close(got, want)
    count = 1 if isinstance(model, CLASSES[1:]) else 2
    assert len(fused) == (count if alone else 2 * count), "fastllm's attention serves what asks for no weights"
    assert [cls.forward for cls in CLASSES] == forwards


@pytest.mark.parametrize(
    ("options", "training"),
    [({}, True), ({"heads": 1}, False), ({"activation": F.silu}, False), ({"bias": False}, False)],
)
def test_what_torch_does_not_fuse_is_served(options, training, monkeypatch):
    calls = []
    monkeypatch.setitem(mode.ROUTES, F.layer_norm, lambda *a, **k: calls.append(1) or functional.layer_norm(*a, **k))
    model = _encoder(dropout=0.0, **options).train(training)
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(training):
        want = model(x)
        with fastllm.accelerated(), fastllm.accelerated():
            got = model(x)
    torch.testing.assert_close(got, want)
    assert len(calls) == 5
