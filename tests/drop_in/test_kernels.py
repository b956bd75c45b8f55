"""One training step of tiny transformers models with the Triton kernels, and plain PyTorch models end to end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from conftest import DEVICE
from contract import assert_as_true
from torch import nn

import fastllm

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

V = 48


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "layers"), [("llama", "num_hidden_layers"), ("bert", "num_hidden_layers"), ("t5_gated", "num_layers")]
)
def test_one_step_with_the_kernels(name, layers):
    pytest.importorskip("transformers")
    model, inputs = build(name, **{layers: 1})
    model.to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    losses = []
    for each, backend in ((model, "triton"), (other, "eager")):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        with fastllm.backend(backend):
            loss = each(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append((loss, each(**inputs).loss))
    torch.testing.assert_close(losses[0], losses[1])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Seq2Seq(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.tokens = nn.Embedding(V, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 24, 0.0, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(16, V)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        h = self.transformer(
            self.tokens(source), self.tokens(target), tgt_mask=mask, tgt_is_causal=True, src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.head(h)


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 7)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, images, labels):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.loss(self.head(self.encoder(x)[:, 0]), labels)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, V)
        self.loss = nn.CrossEntropyLoss(ignore_index=0)

    def forward(self, ids, labels):
        logits = self.head(self.norm(self.lstm(self.tokens(ids))[0]))
        return self.loss(logits.transpose(1, 2), labels)


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items, self.genres = (nn.Embedding(n, 8) for n in (9, 11, 4))
        self.mlp = nn.Sequential(nn.Linear(24, 16), nn.RMSNorm(16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, users, items, genres, ratings):
        x = torch.cat([self.users(users), self.items(items), self.genres(genres)], -1)
        dot = (self.users(users) * self.items(items)).sum(-1)
        return F.mse_loss(self.mlp(x).squeeze(-1) + dot, ratings)


class PostNorm(nn.Module):
    """h + norm(h), one norm in two places, and norms called as functions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, 16), nn.Embedding(12, 16)
        self.shared = nn.RMSNorm(16)
        self.linear = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.rand(16))
        self.head = nn.Linear(16, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, labels):
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        h = h + self.shared(h)
        h = h + self.shared(self.linear(h))
        h = F.rms_norm(h, (16,), self.weight)
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten(), ignore_index=0)


def ids(*shape, high=V):
    return torch.randint(1, high, shape)


def padded():
    source = ids(3, 8)
    source[1, 6:] = 0
    return source


PLAIN = {
    "transformer_post_norm": (lambda: Seq2Seq(False), lambda: (padded(), ids(3, 6))),
    "transformer_pre_norm": (lambda: Seq2Seq(True), lambda: (padded(), ids(3, 6))),
    "vit": (ViT, lambda: (torch.randn(3, 3, 8, 8), ids(3, high=7))),
    "lstm": (Recurrent, lambda: (padded(), padded())),
    "recommender": (Recommender, lambda: (ids(6, high=9), ids(6, high=11), ids(6, high=4), torch.rand(6))),
    "post_norm": (PostNorm, lambda: (ids(3, 8), padded())),
}


def loss_of(model, inputs):
    out = model(*inputs)
    return out if out.dim() == 0 else F.cross_entropy(out.flatten(0, 1), inputs[-1].flatten())


def wide(inputs):
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.runs_on("anywhere")
@pytest.mark.filterwarnings("ignore:.*nested.tensor:UserWarning")
@pytest.mark.parametrize("name", PLAIN)
def test_plain_models(name):
    make, data = PLAIN[name]
    model, inputs = make(), data()
    other = copy.deepcopy(model)
    truth = copy.deepcopy(model).double()
    report = fastllm.accelerate(model)
    assert report.swapped
    losses = []
    for each, given in ((model, inputs), (truth, wide(inputs)), (other, inputs)):
        loss = loss_of(each, given)
        loss.backward()
        losses.append(loss)
    assert_as_true(*losses, torch.float32, f"{name}: loss")
    for (key, p), t, q in zip(model.named_parameters(), truth.parameters(), other.parameters(), strict=True):
        assert_as_true(p.grad, t.grad, q.grad, torch.float32, f"{name}: {key}")
    model.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, inputs), loss_of(other, inputs))
    curves = []
    for each in (model.train(), other.train()):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        curve = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = loss_of(each, inputs)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(*curves, rtol=2e-3, atol=2e-3)
    fastllm.revert(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(model, inputs), loss_of(other, inputs))
