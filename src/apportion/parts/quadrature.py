"""Quadratures: nodes and weights on [0, 1], with the order they declare."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError


@dataclass(frozen=True)
class Quadrature(Configurable):
    """Base of the rules: sum of w_k h(t_k) stands for the integral of h over [0, 1].

    Attributes:
        n: the number of nodes.
    """

    example: ClassVar[str] = "ap.quadrature.Gauss(32)"

    n: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < self._least:
            raise ConfigError(
                f"{type(self).__name__}(n={self.n!r})",
                f"an int of at least {self._least}",
                "write Gauss(32), for example",
            )

    @property
    def _least(self) -> int:
        return 1

    @property
    @abstractmethod
    def order(self) -> int:
        """The order p: applied to each of m equal panels, the error falls as m^-p on smooth functions."""

    @abstractmethod
    def rule(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Give nodes, ascending, and weights, which sum to 1, in float64."""


@dataclass(frozen=True)
class Gauss(Quadrature):
    """Gauss-Legendre: exact for polynomials up to degree 2n - 1; no node at the ends.

    >>> t, w = Gauss(2).rule()
    >>> float((w * t**3).sum())
    0.25
    """

    @property
    def order(self) -> int:
        return 2 * self.n

    def rule(self) -> tuple[Tensor, Tensor]:
        t, w = np.polynomial.legendre.leggauss(self.n)
        return torch.from_numpy((t + 1) / 2), torch.from_numpy(w / w.sum())


@dataclass(frozen=True)
class Midpoint(Quadrature):
    """The middle of each of n intervals, equally weighted.

    >>> Midpoint(2).rule()[0].tolist()
    [0.25, 0.75]
    """

    @property
    def order(self) -> int:
        return 2

    def rule(self) -> tuple[Tensor, Tensor]:
        return (torch.arange(self.n, dtype=torch.float64) + 0.5) / self.n, _equal(self.n)


@dataclass(frozen=True)
class Trapezoid(Quadrature):
    """n nodes from end to end, half weight at both ends.

    >>> Trapezoid(3).rule()[1].tolist()
    [0.25, 0.5, 0.25]
    """

    @property
    def _least(self) -> int:
        return 2

    @property
    def order(self) -> int:
        return 2

    def rule(self) -> tuple[Tensor, Tensor]:
        w = torch.ones(self.n, dtype=torch.float64)
        w[0] = w[-1] = 0.5
        return torch.linspace(0, 1, self.n, dtype=torch.float64), w / (self.n - 1)


@dataclass(frozen=True)
class Left(Quadrature):
    """The left end of each of n intervals: includes the baseline, not the input.

    >>> Left(2).rule()[0].tolist()
    [0.0, 0.5]
    """

    @property
    def order(self) -> int:
        return 1

    def rule(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.n, dtype=torch.float64) / self.n, _equal(self.n)


@dataclass(frozen=True)
class Right(Quadrature):
    """The right end of each of n intervals: includes the input, not the baseline.

    >>> Right(2).rule()[0].tolist()
    [0.5, 1.0]
    """

    @property
    def order(self) -> int:
        return 1

    def rule(self) -> tuple[Tensor, Tensor]:
        return torch.arange(1, self.n + 1, dtype=torch.float64) / self.n, _equal(self.n)


def _equal(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)
