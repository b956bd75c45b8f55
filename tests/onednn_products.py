"""The mark of tests that ask oneDNN for products of a linear layer."""

import pytest
import torch

NEEDS_ONEDNN = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no product by oneDNN",
)
