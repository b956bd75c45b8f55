"""The network over a page's blocks: numpy computes what torch learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastllm.bench.block_network_training import Examples, learn_network
from fastllm.data.clean.block_model import block_model
from fastllm.data.clean.block_network import DILATIONS, MOST, Network


def by_torch(network, rows):
    """The network's definition, in fp64 and with torch's own convolution."""
    of = {name: torch.from_numpy(np.asarray(values, np.float64)) for name, values in vars(network).items()}
    scaled = ((torch.from_numpy(rows).double() - of["mean"]) * of["scale"]).clamp(-MOST, MOST)
    state = F.relu(scaled @ of["layer"] + of["layer_bias"])
    for dilation, weights, bias in zip(DILATIONS, of["convolutions"], of["convolution_biases"], strict=True):
        seen = F.conv1d(state.T[None], weights.permute(2, 1, 0), bias, padding=dilation, dilation=dilation)
        state = state + F.relu(seen[0].T)
    page = F.relu(state @ of["page"] + of["page_bias"]).mean(0)
    return torch.sigmoid(F.relu(state + page @ of["of_page"]) @ of["output"] + of["output_bias"]).numpy()


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 9, 2047, 4100])
def test_numpy_computes_the_network(blocks):
    network = block_model().network
    draw = np.random.default_rng(blocks)
    rows = (network.mean + draw.normal(size=(blocks, len(network.mean))) * 3 / network.scale).astype(np.float32)
    np.testing.assert_allclose(network.probabilities(rows), by_torch(network, rows), rtol=0, atol=1e-4)


def test_a_network_learns_what_a_blocks_neighbours_say():
    draw = np.random.default_rng(0)
    rows = [draw.normal(size=(blocks, 6)).astype(np.float32) for blocks in (*[40] * 60, 1700)]
    # A block is main text if the one before it has a high first feature.
    labels = [(np.concatenate([[0.0], page[:-1, 0]]) > 0).astype(float) for page in rows]
    examples = Examples(rows * 6, labels * 6, [np.ones(len(page)) for page in rows] * 6)
    network = learn_network(examples, seed=1)
    held_out = draw.normal(size=(400, 6)).astype(np.float32)
    right = (network.probabilities(held_out)[1:] > 0.5) == (held_out[:-1, 0] > 0)
    assert right.mean() > 0.9
    again = learn_network(examples, seed=1)
    np.testing.assert_array_equal(again.probabilities(held_out), network.probabilities(held_out))
    saved = Network.of(network.arrays())
    np.testing.assert_allclose(saved.probabilities(held_out), network.probabilities(held_out), rtol=0, atol=5e-3)
