"""Deferred logits, where what they are made of changes before they are read."""

import pytest
import torch
import torch.nn.functional as F
from small_language_model import V, pair


def test_logits_read_after_the_weights_have_changed_raise():
    model, _, ids, labels = pair()
    logits = model(ids)
    F.cross_entropy(logits.view(-1, V), labels.view(-1)).backward()
    read_in_time = model(ids)
    values = read_in_time + 0
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"have changed since.*read them before.*skip=\"linear_cross_entropy\""):
        logits.argmax(-1)
    assert torch.equal(read_in_time, values)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_logits_are_not_read_after_any_part_of_their_layer_has_changed(what):
    model, _, x, _ = pair()
    z = model(x)
    with torch.no_grad():
        getattr(model.head, what).add_(1.0)
    with pytest.raises(RuntimeError, match="have changed since"):
        z.sum()


@pytest.mark.parametrize("use", [lambda z, y: F.cross_entropy(z.view(-1, V), y.flatten()), lambda z, y: z.exp().sum()])
def test_a_constant_that_is_changed_after_it_was_added_to_the_logits_is_not_taken_changed(use):
    model, other, x, y = pair()
    constant = torch.randn(1, V)
    z, expected = model(x) + constant, other(x) + constant
    constant.mul_(2.0)
    torch.testing.assert_close(use(z, y), use(expected, y))


@pytest.mark.parametrize("kind", ["mask", "numbers", "numbers and a place"])
def test_an_index_that_is_changed_after_it_was_taken_of_the_logits_is_not_taken_changed(kind):
    model, other, x, _ = pair()
    sums = []
    for each in (model, other):
        part = x % 3 == 0 if kind == "mask" else torch.tensor([0, 2])
        z = each(x)[(part, 1) if kind == "numbers and a place" else part]
        part.fill_(1)
        sums.append(z.exp().sum())
    torch.testing.assert_close(*sums)
