"""Norms that are one by another name, modules that only look like one, and a model of a table and a head."""

import torch
from torch import nn


class Lookalike(nn.Module):
    """Llama's RMSNorm; what subclasses change is what the measurement must see."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden):
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)


class ZeroCentred(Lookalike):
    def forward(self, hidden):
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(hidden)


class WithoutWeight(nn.Module):
    eps = 1e-5

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class L2NormOfWidth(WithoutWeight):
    pass


class CentredLookalike(Lookalike):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OutsideTheRoot(Lookalike):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class BoundedBelow(Lookalike):
    def forward(self, x):
        return self.weight * x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(self.variance_epsilon)


class SampleDeviation(Lookalike):
    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.variance_epsilon)


class OtherDimension(Lookalike):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.variance_epsilon)


class StoppedGradient(Lookalike):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()


class Noisy(Lookalike):
    def forward(self, x):
        x = x + 0.01 * torch.randn_like(x) if self.training else x
        return super().forward(x)


class InPlace(Lookalike):
    def forward(self, x):
        return x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).mul_(self.weight)


class Pair(Lookalike):
    def forward(self, x):
        return super().forward(x), x


class Partial(Lookalike):
    def forward(self, x):
        half = x.shape[-1] // 2
        mean = x[..., :half].pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean + self.variance_epsilon)


class AnotherArgument(Lookalike):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Wrong(Lookalike):
    def forward(self, x):
        raise RuntimeError("no such device")


class Bigrams(nn.Module):
    """A table and a head of as many rows, so that the head is found."""

    def __init__(self, tokens=20, size=8):
        super().__init__()
        self.tokens, self.head = nn.Embedding(tokens, size), nn.Linear(size, tokens)

    def forward(self, ids):
        return self.head(self.tokens(ids))
