"""Small functions with closed-form attributions; each takes [R, d] and gives [R]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Points = Float[Tensor, "R d"]
Scores = Float[Tensor, " R"]


class Linear(nn.Module):
    """w · x + b.

    >>> Linear([1.0, 2.0], 1.0)(torch.ones(1, 2, dtype=torch.float64))
    tensor([4.], dtype=torch.float64)
    """

    def __init__(self, weight: list[float], bias: float = 0.0) -> None:
        """Set w and b."""
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))
        self.bias = bias

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        return F.linear(x, self.get_buffer("weight").to(x.dtype)[None])[:, 0] + self.bias


class RootSum(nn.Module):
    """x1 + √x2, whose contributions are x1 and √x2 (Ancona et al. 2019, section 3)."""

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        return x[:, 0] + x[:, 1].sqrt()


class ReluProduct(nn.Module):
    """relu(x1 - 1) · relu(x2): a multiplicative interaction (Ancona et al. 2019, section 3)."""

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        return (x[:, 0] - 1).relu() * x[:, 1].relu()


class Max(nn.Module):
    """max(x1, x2) as a ReLU network: ½ [relu(x1 - x2) + relu(x2 - x1) + relu(x1 + x2)], for x1 + x2 ≥ 0."""

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        a, b = x[:, 0], x[:, 1]
        return 0.5 * ((a - b).relu() + (b - a).relu() + (a + b).relu())


class Saturated(nn.Module):
    """1 - relu(1 - x1): flat for x1 ≥ 1, so that the gradient there is 0 (Sundararajan et al. 2017)."""

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        return 1 - (1 - x[:, 0]).relu() + 0 * x.sum(1)


class Product(nn.Module):
    """The product of all features."""

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        return x.prod(1)


class Min(nn.Module):
    """min(x1, x2) = x1 - relu(x1 - x2)."""

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        return x[:, 0] - (x[:, 0] - x[:, 1]).relu()
