"""Deferred logits and embeddings: the loss without the logits, and the logits for whoever asks."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_true
from small_language_model import LanguageModel, V, pair
from torch import nn

import fastllm
from fastllm.drop_in.deferred import Deferred


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def fused(monkeypatch):
    """How often the loss was taken without logits, and embeddings were summed in one op."""
    from fastllm.drop_in import logits, rows

    calls = []
    for module, name in ((logits, "linear_cross_entropy"), (rows, "embedding_sum")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, original=original, name=name, **k: calls.append(name) or original(*a, **k)
        )
    return calls


LOSSES = {
    "view": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "reshape": lambda z, y: F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1)),
    "flatten": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "transpose": lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="sum"),
    "permute": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y, reduction="none").square().mean(),
    "float": lambda z, y: nn.CrossEntropyLoss(ignore_index=3)(z.float().view(-1, V), y.view(-1)),
    "shift": lambda z, y: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)),
    "slice": lambda z, y: F.cross_entropy(z[:, 2:].reshape(-1, V), y[:, 2:].reshape(-1)),
    "full_slice": lambda z, y: F.cross_entropy(z[:, -1, :], y[:, -1]),
    "masked": lambda z, y: F.cross_entropy(z[y > 5], y[y > 5]),
    "scaled": lambda z, y: F.cross_entropy((z * 0.5).view(-1, V), y.view(-1)),
    "softcap": lambda z, y: F.cross_entropy((torch.tanh(z / 3.0) * 3.0).view(-1, V), y.view(-1)),
    "scaled_softcap": lambda z, y: F.cross_entropy((torch.tanh(2.0 * z / 3.0) * 3.0).view(-1, V), y.view(-1)),
    "shifted_classes": lambda z, y: F.cross_entropy((z + torch.linspace(-1, 1, V)[None]).view(-1, V), y.view(-1)),
    "weighted": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), torch.linspace(0.5, 2, V)),
}
ORDINARY = {
    "probabilities": lambda z, y: F.cross_entropy(z.view(-1, V), F.one_hot(y.view(-1), V).float()),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, -1).view(-1, V), y.view(-1)),
    "tanh": lambda z, y: F.cross_entropy(torch.tanh(z).view(-1, V), y.view(-1)),
    "other_cap": lambda z, y: F.cross_entropy((torch.tanh(z / 3.0) * 2.0).view(-1, V), y.view(-1)),
    "sum": lambda z, y: z.square().mean() + (z.argmax(-1) == y).float().mean(),
    "classes_cut": lambda z, y: F.cross_entropy(z[..., :30].reshape(-1, 30), y.view(-1) % 30),
    "added": lambda z, y: F.cross_entropy((z + torch.ones(7, 1)).view(-1, V), y.view(-1)),
    "shifted_and_scaled": lambda z, y: F.cross_entropy(((z * 2 + torch.ones(V)) * 3).view(-1, V), y.view(-1)),
    "in_place": lambda z, y: F.cross_entropy(z.masked_fill_(torch.arange(V) == 0, -9.0).view(-1, V), y.view(-1)),
    "viewed_then_changed": lambda z, y: _viewed_then_changed(z, y),
    "scaled_then_changed": lambda z, y: _scaled_then_changed(z, y),
    "class_dimension_is_time": lambda z, y: F.cross_entropy(z, y[:, :1].expand(-1, V) % 7),
}


def _viewed_then_changed(z, y):
    flat = z.view(-1, V)
    z[..., 0] = -9.0
    return F.cross_entropy(flat, y.view(-1))


def _scaled_then_changed(z, y):
    half = z * 0.5
    z[..., 0] = -9.0
    return F.cross_entropy(half.view(-1, V), y.view(-1)) + z.square().mean()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_never_sees_the_logits(name, bias, fused):
    model, other, ids, labels = pair(bias)
    logits = model(ids)
    assert type(logits) is Deferred
    assert logits.shape == (3, 7, V)
    loss, want = LOSSES[name](logits, labels), LOSSES[name](other(ids), labels)
    truth = copy.deepcopy(other).double()
    narrow = name in ("float", "weighted", "shifted_classes")  # these narrow to fp32 on the way
    exact = None if narrow else LOSSES[name](truth(ids), labels)
    assert type(loss) is torch.Tensor
    assert loss.dtype == want.dtype
    assert fused == ["embedding_sum", "linear_cross_entropy"]
    assert logits.plan.value is None
    torch.testing.assert_close(loss, want)
    for each in (loss, want, exact):
        if each is not None:
            each.backward()
    for key, grad in gradients(model).items():
        if narrow:
            torch.testing.assert_close(grad, gradients(other)[key])
        else:
            assert_as_true(grad, gradients(truth)[key], gradients(other)[key], torch.float32, key)
    with torch.no_grad():
        torch.testing.assert_close(logits + 0, other(ids))


@pytest.mark.parametrize("name", ORDINARY)
def test_every_other_use_gets_the_logits(name, fused):
    model, other, ids, labels = pair()
    loss, want = ORDINARY[name](model(ids), labels), ORDINARY[name](other(ids), labels)
    assert "linear_cross_entropy" not in fused
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(other)[key], msg=key)


def test_a_loss_and_an_auxiliary_loss_on_the_same_logits(fused):
    """Liger-Kernel's cross-entropy overwrites the logits with their gradient; an auxiliary loss then is wrong."""
    results = []
    model, other, ids, labels = pair()
    for each in (model, other):
        logits = each(ids)
        loss = F.cross_entropy(logits.view(-1, V), labels.view(-1)) + 1e-2 * logits.logsumexp(-1).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(gradients(each))
    assert "linear_cross_entropy" in fused
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


def test_code_below_python_keeps_the_gradient():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    model, other, ids, _ = pair()
    Double.apply(model(ids)).square().mean().backward()
    Double.apply(model(ids).view(-1, V)).square().mean().backward()
    (2 * Double.apply(other(ids)).square().mean()).backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(other)[key])
    embedded = model.tokens(ids)
    assert type(embedded) is Deferred
    model.zero_grad()
    Double.apply(embedded).sum().backward()
    other.zero_grad()
    (2 * other.tokens(ids)).sum().backward()
    torch.testing.assert_close(model.tokens.weight.grad, other.tokens.weight.grad)


def test_second_order_through_the_values():
    model, other, ids, labels = pair()
    penalties = []
    for each in (model, other):
        loss = F.cross_entropy(each(ids).view(-1, V), labels.view(-1))
        (grad,) = torch.autograd.grad(loss, each.head.weight, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), each.head.weight)[0])
        z = each(ids).exp().sum()
        (grad,) = torch.autograd.grad(z, each.head.weight, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), each.head.weight)[0])
    torch.testing.assert_close(penalties[:2], penalties[2:])


def test_hooks_and_gradients_at_the_logits(fused):
    model, other, ids, labels = pair()
    kept = []
    for each in (model, other):
        logits = each(ids)
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), labels.view(-1)).backward()
        kept.append(logits.grad)
    assert "linear_cross_entropy" not in fused
    torch.testing.assert_close(*kept)
    logits = model(ids)
    loss = F.cross_entropy(logits.view(-1, V), labels.view(-1))
    for ask in (lambda: logits.register_hook(print), logits.retain_grad, lambda: torch.autograd.grad(loss, logits)):
        with pytest.raises(RuntimeError, match=r'skip="linear_cross_entropy"'):
            ask()
    model.head.register_forward_hook(lambda module, args, output: None)
    assert type(model(ids)) is torch.Tensor


def test_evaluation_and_no_grad_give_plain_logits():
    model, other, ids, _ = pair()
    with torch.no_grad():
        assert type(model(ids)) is torch.Tensor
    model.eval()
    assert type(model(ids)) is torch.Tensor
    torch.testing.assert_close(model(ids), other(ids))


def test_deferred_tensors_behave_like_tensors():
    model, other, ids, _ = pair()
    logits, want = model(ids), other(ids)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.dtype, logits.device, logits.ndim, len(logits)) == (
        want.shape, want.dtype, want.device, 3, 3,
    )  # fmt: skip
    assert logits.requires_grad
    assert logits.grad_fn is not None
    assert not logits.is_leaf
    torch.testing.assert_close(logits.detach().numpy(), want.detach().numpy())
    torch.testing.assert_close(torch.stack([logits, logits])[1], want)
    torch.testing.assert_close(logits[0, 0].tolist(), want[0, 0].tolist())
    assert repr(model(ids)).startswith("tensor(")
    file = io.BytesIO()
    torch.save(model(ids).detach(), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file), want.detach())
    x = torch.zeros(3, 7, V)
    x += model(ids).detach()
    x.copy_(model(ids))
    torch.testing.assert_close(torch.cat([x, model(ids)]), torch.cat([want, want]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_hidden_states_and_a_loss_in_fp32(dtype):
    model, other, ids, labels = pair()
    truth = copy.deepcopy(other).to(dtype).double()
    model.to(dtype)
    other.to(dtype)
    results = [
        F.cross_entropy(each(ids).to(wide).view(-1, V), labels.view(-1))
        for each, wide in ((model, torch.float32), (truth, torch.float64), (other, torch.float32))
    ]
    assert results[0].dtype == torch.float32
    assert_as_true(*results, dtype, "loss")
    for loss in results:
        loss.backward()
    for key, grad in gradients(model).items():
        assert_as_true(grad, gradients(truth)[key], gradients(other)[key], dtype, key)
    same = F.cross_entropy(model(ids).view(-1, V), labels.view(-1))
    assert same.dtype == dtype


def test_autocast_and_grad_scaler(fused):
    model, other, ids, labels = pair()
    with torch.autocast("cpu", torch.bfloat16):
        logits, want = model(ids), other(ids)
        assert logits.dtype == want.dtype == torch.bfloat16
        loss = F.cross_entropy(logits.view(-1, V), labels.view(-1))
        expected = F.cross_entropy(want.view(-1, V), labels.view(-1))
    assert loss.dtype == expected.dtype == torch.float32
    assert "linear_cross_entropy" in fused
    # Logits and their gradients may be rounded to bfloat16 once more or less.
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(logits + 0, want)  # outside autocast: what the forward would have given
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for each, value in ((model, loss), (other, expected)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-8, atol=1e-4)


def test_tied_weights_get_both_gradients():
    model, other = LanguageModel(bias=False), None
    model.head.weight = model.tokens.weight
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    ids, labels = torch.randint(V, (3, 7)), torch.randint(V, (3, 7))
    for each in (model, other):
        F.cross_entropy(each(ids).view(-1, V), labels.view(-1)).backward()
    assert model.head.weight is model.tokens.weight
    torch.testing.assert_close(model.tokens.weight.grad, other.tokens.weight.grad)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_gradients_only_for_what_needs_them(frozen):
    """Liger-Kernel loses the head's gradient when the hidden states are frozen."""
    model, other, ids, labels = pair()
    for each in (model, other):
        each.requires_grad_(frozen == "head")
        each.head.requires_grad_(frozen == "body")
        F.cross_entropy(each(ids).view(-1, V), labels.view(-1)).backward()
    for key, grad in gradients(model).items():
        want = gradients(other)[key]
        assert (grad is None) == (want is None), key
        if want is not None:
            torch.testing.assert_close(grad, want)


def test_an_id_out_of_range_is_an_index_error():
    """Liger-Kernel's fused loss reads out of bounds and returns a plausible number."""
    model, _, ids, labels = pair()
    labels[0, 0] = V
    with pytest.raises(IndexError):
        F.cross_entropy(model(ids).view(-1, V), labels.view(-1))
    with pytest.raises(IndexError):
        model(ids + V) + 0


def test_all_targets_ignored_and_no_rows_give_what_torch_gives():
    model, _, ids, labels = pair()
    labels[:] = -100
    assert F.cross_entropy(model(ids).view(-1, V), labels.view(-1)).isnan()
    assert F.cross_entropy(model(ids).view(-1, V), labels.view(-1), reduction="sum") == 0
    assert F.cross_entropy(model(ids[:0]).view(-1, V), labels[:0].view(-1)).isnan()


def test_embeddings_that_are_not_added_are_ordinary(fused):
    model, other, ids, _ = pair()
    for each in (model, other):
        parts = [each.tokens(ids), each.positions(ids % 12)]
        value = torch.cat(parts, -1).square().mean() + (parts[0] * parts[1]).mean() + (parts[0] + 1.0).mean()
        value.backward()
    assert fused == []
    torch.testing.assert_close(model.tokens.weight.grad, other.tokens.weight.grad)
    torch.testing.assert_close(model.positions.weight.grad, other.positions.weight.grad)


def test_sums_of_embeddings_can_be_named_or_left_out(fused):
    ids = torch.randint(V, (3, 7))
    for options, sums in (({"only": "embedding_sum"}, 1), ({"skip": "embedding_sum"}, 0), ({"skip": "embedding"}, 0)):
        model = LanguageModel()
        report = fastllm.accelerate(model, **options)
        assert any(e.by == "embedding" for e in report.swapped) == (options.get("skip") != "embedding")
        fused.clear()
        model(ids) + 0
        assert fused.count("embedding_sum") == sums


@pytest.mark.parametrize(
    "how",
    [
        {"weight": torch.ones(V - 1)}, {"weight": torch.ones(1, V)}, {"label_smoothing": 1.5}, {"reduction": "no"},
        {"ignore_index": 10**30}, {"ignore_index": True},
    ],
    ids=["short weight", "2-D weight", "smoothing", "reduction", "large ignore_index", "true ignore_index"],
)  # fmt: skip
def test_a_loss_that_torch_refuses_is_refused_in_its_words(how):
    model, other, x, y = pair()
    z, expected = model(x).view(-1, V), other(x).view(-1, V)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
        F.cross_entropy(expected, y.flatten(), **how)
    with pytest.raises(type(theirs.value)) as ours:
        F.cross_entropy(z, y.flatten(), **how)
    assert str(ours.value) == str(theirs.value)
    # And the logits are as good as before.
    F.cross_entropy(z, y.flatten()).backward()
    F.cross_entropy(expected, y.flatten()).backward()
    theirs = gradients(other)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, theirs[name])
