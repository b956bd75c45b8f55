"""Deferred logits and rows where and as nobody expects them: odd layouts, modes, transforms, checkpoints, traces."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastllm

V = 30


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, 8), nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, V)

    def embed(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


@pytest.fixture
def models():
    model = Model()
    other = copy.deepcopy(model)
    assert len(fastllm.accelerate(model).swapped) == 4
    return model, other


IDS, LABELS = torch.arange(12).view(2, 6), torch.arange(12).view(2, 6) * 2


def both(models, use):
    """``use(model)`` of each, and the gradients that it has left, compared."""
    found = [(use(model), [p.grad for p in model.parameters()]) for model in models]
    torch.testing.assert_close(*found, equal_nan=True)


def loss_of(logits):
    return F.cross_entropy(logits.reshape(-1, V), LABELS[:, : logits.shape[1]].reshape(-1))


LAYOUTS = {
    "slice": lambda z: z[:, :-1],
    "contiguous_slice": lambda z: z[:, :-1].contiguous().view(-1, V),
    "transposed": lambda z: z.transpose(1, 2) * 2.0,
    "contiguous_transposed": lambda z: z.transpose(1, 2).contiguous().view(2, -1),
    "reshaped_slice": lambda z: z[:, 1:].reshape(-1, V),
    "scaled_slice": lambda z: (z[:, 1:] * 0.5).float(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_the_values(models, name):
    got, want = (LAYOUTS[name](model(IDS)) for model in models)
    assert (got.shape, got.stride(), got.is_contiguous()) == (want.shape, want.stride(), want.is_contiguous())
    torch.testing.assert_close(got * 1, want)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        models[0](IDS)[:, :-1].view(-1, V)


def test_a_copy_does_not_follow_what_it_was_copied_from(models):
    def use(model):
        logits = model(IDS)
        copied = logits[:, :-1].reshape(-1, V)
        logits.mul_(0.0)
        return copied.sum(1)

    both(models, use)


def test_reading_in_inference_mode_and_in_transforms(models):
    def use(model):
        rows, logits = model.embed(IDS), model(IDS)
        with torch.inference_mode():
            right = (logits.argmax(-1) == LABELS).sum() + rows.argmax()
        weight = torch.ones(V)
        slope = torch.func.grad(lambda w: (w * model(IDS)).sum() + (w * logits).sum())(weight)
        (loss_of(logits) + rows.square().mean()).backward()
        return right, slope

    both(models, use)


def test_ids_that_change_before_their_rows_are_read(models):
    def use(model):
        with torch.no_grad():
            ids = IDS.clone()
            rows, single = model.embed(ids), model.tokens(ids[:1].expand(3, -1))
            ids.fill_(3)
            return rows + 0, single + 0

    both(models, use)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_what_reads_and_what_takes_the_loss(models, reentrant):
    def use(model):
        hidden = checkpoint(lambda h: h + model.norm(h), model.embed(IDS), use_reentrant=reentrant)
        loss = checkpoint(lambda h: loss_of(model.head(h)), hidden, use_reentrant=reentrant)
        logits = checkpoint(model.head, hidden, use_reentrant=reentrant)
        (loss + loss_of(logits[:, 1:]) + logits.logsumexp(-1).sum()).backward()
        return loss

    both(models, use)


def test_embeddings_of_two_dtypes_are_added_as_pytorch_adds_them(models):
    def use(model):
        model.positions.to(torch.float64)
        rows = model.embed(IDS)
        rows.sum().backward()
        return rows.detach()

    both(models, use)


def test_autocast_leaves_double_precision(models):
    def use(model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.double()(IDS)
            loss = loss_of(logits)
        loss.backward()
        return logits.detach(), loss

    both(models, use)


def test_scales_that_no_kernel_takes(models):
    for scale in (float("inf"), 0, -1e-320):
        both(models, lambda model, scale=scale: loss_of(model(IDS) * scale * scale))


def nodes(graph):
    """The nodes of a TorchScript graph and of the blocks within."""
    for node in graph.nodes():
        yield node
        for block in node.blocks():
            yield from nodes(block)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_of_torchs_operators_alone(models):
    model, other = models
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model.eval(), (IDS,)), file)
    file.seek(0)
    again = torch.jit.load(file)
    # Kinds of nodes, not the graph's text, which holds the paths of source files.
    kinds = {node.kind() for node in nodes(again.inlined_graph)}
    assert "aten::embedding" in kinds
    assert {kind.split("::")[0] for kind in kinds} <= {"aten", "prim"}
    torch.testing.assert_close(again(IDS.flip(0)), other(IDS.flip(0)))


def test_operators_that_are_recorded_do_not_wait(models):
    def use(model):
        graph = make_fx(lambda ids: loss_of(model(ids)))(IDS)
        with FlopCounterMode(display=False) as counter:
            loss_of(model(IDS))
        return graph(IDS.flip(0)), counter.get_total_flops()

    both(models, use)


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, tensor: tensor.retain_grad(),
        lambda loss, tensor: tensor.register_hook(print),
        lambda loss, tensor: torch.autograd.graph.register_multi_grad_hook([tensor], print),
        lambda loss, tensor: torch.autograd.grad(loss, tensor, allow_unused=True),
        lambda loss, tensor: loss.backward(inputs=[tensor]),
    ],
)
@pytest.mark.parametrize("read", [False, True])
def test_a_gradient_that_is_asked_for_too_late_raises(ask, read, models):
    model, _ = models
    ids = torch.randint(V, (2, 5))
    rows = model.tokens(ids)
    logits = model.head(rows + model.positions(torch.arange(5)))
    loss = F.cross_entropy(logits.view(-1, V), ids.view(-1))
    for tensor, option in ((logits, "linear_cross_entropy"), (rows, "embedding_sum")):
        if read:
            tensor.argmax(-1)
        with pytest.raises(RuntimeError, match=f'skip="{option}"'):
            ask(loss, tensor)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_gradients_at_what_was_read_or_is_not_yet_taken(models):
    ids, kept = torch.randint(V, (2, 5)), []
    for each in models:
        rows = each.tokens(ids)
        logits = each.head(rows)
        got: list = []
        torch.autograd.graph.register_multi_grad_hook([logits], got.extend)
        loss = F.cross_entropy(logits.view(-1, V), ids.view(-1))
        got += torch.autograd.grad(loss, [torch.autograd.graph.get_gradient_edge(rows)], retain_graph=True)
        loss.backward(inputs=[logits, rows])
        kept.append([*got, logits.grad, rows.grad])
    torch.testing.assert_close(*kept)


def test_attributes_are_those_of_the_values_once_they_are_there(models):
    ids = torch.randint(V, (2, 5))
    for each in models:
        each.tokens.requires_grad_(False)
        rows = each.tokens(ids)
        rows.requires_grad_()
        assert (rows.requires_grad, rows.is_leaf) == (True, True)
        each.norm(rows + each.positions(torch.arange(5))).square().sum().backward()
        rows.detach_().transpose_(0, 1)
        assert (rows.shape, rows.stride(), rows.grad.shape) == ((5, 2, 8), (8, 40, 1), (2, 5, 8))
    assert not models[0].tokens(ids).requires_grad


def test_a_backward_from_logits_whose_loss_was_taken(models):
    ids = torch.randint(V, (2, 5))
    for each in models:
        logits = each(ids)
        F.cross_entropy(logits.view(-1, V), ids.view(-1)).backward(retain_graph=True)
        (grad,) = torch.autograd.grad(logits, [each.head.weight], torch.ones_like(logits), retain_graph=True)
        each.head.weight.grad += grad
        torch.autograd.backward([logits], [torch.ones_like(logits)])
    torch.testing.assert_close(*(each.head.weight.grad for each in models))
