"""What people write with fastllm, for a type checker alone: `basedpyright` finds nothing to object to here."""

from typing import assert_type

import torch
from torch import Tensor

import fastllm
import fastllm.functional as F
from fastllm import losses, nn

x, weight, target = torch.randn(4, 8), torch.randn(16, 8), torch.randint(16, (4,))
query = torch.randn(1, 2, 4, 8)

assert_type(F.layer_norm(x, (8,)), Tensor)
assert_type(F.rms_norm(x, 8), Tensor)
assert_type(F.add_rms_norm(x, x, (8,)), tuple[Tensor, Tensor])
assert_type(F.attention(query, query, query, causal=True, window=(3, None)), Tensor)
assert_type(F.attention(query, query, query, return_lse=True), tuple[Tensor, Tensor])
assert_type(F.linear_log_probs(x, weight, target), Tensor)
assert_type(F.linear_log_probs(x, weight, target, return_entropy=True), tuple[Tensor, Tensor])
F.cross_entropy(x @ weight.T, target, reduction="sum", return_lse=False).backward()
F.linear_cross_entropy(x, weight, target, label_smoothing=0.1).backward()
loss, accuracy = F.linear_cross_entropy(x, weight, target, return_accuracy=True)
# A misspelt option is seen before anything runs.
F.cross_entropy(x @ weight.T, target, reduction="avg")  # pyright: ignore[reportArgumentType]
F.geglu(x, x, approximate="erf")  # pyright: ignore[reportArgumentType]

chosen, rejected = torch.randn(4), torch.randn(4)
assert_type(losses.dpo(chosen, rejected, chosen, rejected, kind="ipo"), Tensor)
assert_type(losses.grpo(query[0, 0], None, chosen, x, return_metrics=True), tuple[Tensor, dict[str, Tensor]])
losses.ppo(query[0, 0], None, chosen, x, kl_estimator="k4")  # pyright: ignore[reportArgumentType]

model = torch.nn.Sequential(nn.LayerNorm(8), torch.nn.Linear(8, 16), nn.RMSNorm(16))
assert_type(fastllm.accelerate(model), fastllm.Report)
assert_type(fastllm.revert(model), int)
assert_type(fastllm.info(), str)
with fastllm.backend("eager"):
    model(x)
