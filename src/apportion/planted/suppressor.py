"""A suppressor variable: it says nothing of the class, and the best classifier needs it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.core.errors import ConfigError
from apportion.planted.problem import Planted, normal, seeded


@dataclass(frozen=True, eq=False, kw_only=True)
class Suppressor(Planted):
    """Two features: x = (1, 0) y + noise with correlated noise, y = ±1, and the best linear classifier w · x.

    `truth` is [True, False]: only feature 0 is statistically related to y.

    Attributes:
        labels: y of each row of `x`.
        covariance: of the noise, [[s1², c s1 s2], [c s1 s2, s2²]].
        weight: w ∝ (1, -c s1 / s2), which is Σ⁻¹ (1, 0), of length 1.
        pattern: Cov(x) w, the direction of the signal; its second entry is 0.
    """

    labels: Float[Tensor, " n"]
    covariance: Float[Tensor, "2 2"]
    weight: Float[Tensor, " 2"]
    pattern: Float[Tensor, " 2"]

    def draw(self, count: int, seed: int = 0) -> tuple[Float[Tensor, "count 2"], Float[Tensor, " count"]]:
        """Draw independent examples, and their labels, ±1 with equal chances.

        Args:
            count: how many.
            seed: of labels and noise.
        """
        generator = seeded(seed)
        labels = torch.randint(2, (count,), generator=generator).double() * 2 - 1
        noise = normal(generator, count, 2) @ torch.linalg.cholesky(self.covariance).T
        return noise + labels[:, None] * torch.tensor([1.0, 0.0]), labels


def suppressor(c: float = 0.8, s1: float = 1.0, s2: float = 1.5, examples: int = 200, seed: int = 0) -> Suppressor:
    """Plant a suppressor variable (Wilming et al. 2023, arXiv:2306.01464, section 3).

    Feature 1 is noise alone, and independent of y. Where it is correlated with the noise in feature 0, subtracting it
    cleans feature 0, so the best classifier has weight on it: gradient, integrated gradients, Shapley values against
    the mean, LIME and permutation call it important. Patterns do not: Cov(x) w ∝ (1, 0). The rows of `x` have exactly
    the moments of labels and noise, so that what is estimated from them is exact.

    Args:
        c: correlation of the two noises, between -1 and 1.
        s1: standard deviation of the noise in feature 0.
        s2: the same of feature 1.
        examples: rows of `x`, even, at least 8; half of each label.
        seed: of the noise.

    Raises:
        ConfigError: arguments out of these ranges.

    >>> p = suppressor(c=0.6, s1=1.0, s2=2.0)
    >>> torch.round(p.weight[1] / p.weight[0], decimals=6), bool(p.pattern[1].abs() < 1e-12)
    (tensor(-0.3000, dtype=torch.float64), True)
    """
    if not (abs(c) < 1 and s1 > 0 and s2 > 0):
        raise ConfigError(f"c={c}, s1={s1}, s2={s2}", "|c| < 1, s1 > 0, s2 > 0", "give a covariance of full rank")
    if examples < 8 or examples % 2:
        raise ConfigError(f"examples={examples}", "an even number, at least 8", "take as many of each label")
    covariance = torch.tensor([[s1**2, c * s1 * s2], [c * s1 * s2, s2**2]], dtype=torch.float64)
    weight = torch.tensor([1.0, -c * s1 / s2], dtype=torch.float64)
    weight = weight / math.hypot(*weight.tolist())
    signal = torch.tensor([1.0, 0.0], dtype=torch.float64)
    labels = torch.ones(examples, dtype=torch.float64)
    labels[1::2] = -1
    # what is left after regression on 1 and y, made white: the moments are then exact
    known = torch.stack([torch.ones_like(labels), labels], 1) / examples**0.5
    noise = normal(seeded(seed), examples, 2)
    noise = noise - known @ (known.T @ noise)
    white = torch.linalg.qr(noise).Q * examples**0.5
    x = labels[:, None] * signal + white @ torch.linalg.cholesky(covariance).T
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64, device="meta").to_empty(device="cpu").eval()
    model.requires_grad_(False).weight.copy_(weight[None])
    return Suppressor(
        model=model,
        x=x,
        labels=labels,
        baseline=torch.zeros(1, 2, dtype=torch.float64),
        truth=torch.tensor([True, False]),
        covariance=covariance,
        weight=weight,
        pattern=(covariance + torch.outer(signal, signal)) @ weight,
        target=0,
    )
