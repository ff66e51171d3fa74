"""Polynomials, which are their own Taylor series: each term can be asked about by itself."""

from __future__ import annotations

from itertools import product
from math import comb, prod

import torch
from torch import Tensor, nn

from apportion.core.errors import ConfigError
from apportion.planted.functions import Points, Scores


class Polynomial(nn.Module):
    """Σ c_κ Π_i (x_i - p_i)^κ_i over exponents κ, of rows flattened; by products only, each with its own factors.

    >>> Polynomial({(1, 0): 2.0, (2, 1): 1.0})(torch.tensor([[2.0, 3.0]]))     # 2 x1 + x1² x2
    tensor([16.])
    """

    center: Tensor

    def __init__(self, terms: dict[tuple[int, ...], float], center: Tensor | None = None) -> None:
        """Set the coefficient of each κ, one exponent a feature, and p, 0 unless given.

        Raises:
            ConfigError: no terms, exponents of different lengths, or a center of another length.
        """
        super().__init__()
        lengths = {len(k) for k in terms}
        if len(lengths) != 1 or any(e < 0 for k in terms for e in k):
            raise ConfigError(
                f"terms {list(terms)}", "one exponent of 0 or more for each feature", "write {(1, 0): 2.0, (1, 1): 3.0}"
            )
        self.terms, features = dict(terms), lengths.pop()
        given = torch.zeros(features, dtype=torch.float64) if center is None else center.detach().flatten().double()
        if len(given) != features:
            raise ConfigError(f"a center of {len(given)} numbers", f"{features}", "give one a feature")
        self.register_buffer("center", given)

    def forward(self, x: Points) -> Scores:
        """Evaluate."""
        flat = x.flatten(1)
        moves = flat - self.center.to(flat)
        total = None
        for exponents, coefficient in self.terms.items():
            term = None
            for i, times in enumerate(exponents):
                for _ in range(times):
                    term = moves[:, i] if term is None else term * moves[:, i]
            term = coefficient * (torch.ones_like(flat[:, 0]) if term is None else term)
            total = term if total is None else total + term
        assert total is not None  # one term at least
        return total

    def around(self, point: Tensor) -> Polynomial:
        """Write the same function in powers of x - point: its Taylor series there, whole.

        >>> Polynomial({(2,): 1.0}).around(torch.tensor([3.0])).terms     # 9 + 6 (x - 3) + (x - 3)²
        {(0,): 9.0, (1,): 6.0, (2,): 1.0}
        """
        shift = (point.detach().flatten().double().cpu() - self.center.cpu()).tolist()
        found: dict[tuple[int, ...], float] = {}
        for exponents, coefficient in self.terms.items():
            for lower in product(*(range(e + 1) for e in exponents)):
                kept = prod(comb(e, k) * s ** (e - k) for e, k, s in zip(exponents, lower, shift, strict=True))
                found[lower] = found.get(lower, 0.0) + coefficient * kept
        named = {k: c for k, c in sorted(found.items()) if c != 0} or {(0,) * len(shift): 0.0}
        return Polynomial(named, point)
