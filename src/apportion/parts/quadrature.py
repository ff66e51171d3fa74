"""Quadratures: nodes and weights on [0, 1], with the order they declare."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError
from apportion.core.question import Question
from apportion.core.streams import Stream


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

    @property
    def ordered(self) -> bool:
        """Whether each node lies in its cell, the stretch as long as its weight, with cells side by side."""
        return True

    @property
    def at_cell_start(self) -> bool:
        """Whether each node is the beginning of its cell."""
        return False

    @abstractmethod
    def rule(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Give nodes, ascending, and weights, which sum to 1, in float64."""

    def nodes(self, q: Question) -> Nodes:
        """Place the nodes for the examples of a question."""
        t, w = self.rule()
        edges = torch.cat([w.new_zeros(1), w.cumsum(0)])
        edges[-1] = 1
        close = (edges[:-1] - t).abs() < 1e-12  # the sum of weights meets the node but for rounding
        edges[:-1] = torch.where(close, t, edges[:-1])
        return Nodes(t.to(q.device), edges.to(q.device))


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes with their cells, the same for all examples.

    Attributes:
        t: the nodes, ascending.
        edges: where cells begin and end, from 0 to 1.
    """

    t: Float[Tensor, " n"]
    edges: Float[Tensor, " m"]

    @property
    def count(self) -> int:
        """How many nodes each path gets."""
        return len(self.t)

    @property
    def reaches_ends(self) -> bool:
        """Whether a node lies at 0 or 1."""
        return bool(self.t[0] <= 0) or bool(self.t[-1] >= 1)

    def at(
        self, node: Int[Tensor, " R"], owner: Int[Tensor, " R"], branch: Int[Tensor, " R"]
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Give the place of a node on a branch, and where its cell begins and ends."""
        return self.t[node], self.edges[node], self.edges[node + 1]


@dataclass(frozen=True, eq=False)
class RandomNodes(Nodes):
    """Nodes drawn anew for each example and branch.

    Attributes:
        stream: gives the random numbers.
        stratified: draw within the node's own cell.
    """

    stream: Stream
    stratified: bool

    @property
    def reaches_ends(self) -> bool:
        return False

    def at(self, node: Tensor, owner: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.edges[node], self.edges[node + 1]
        draw = (branch * self.count + node).cpu()
        u = self.stream.uniform(torch.zeros(1, 1), owner.cpu(), draw)[:, 0].to(low)
        return (low + u * (high - low) if self.stratified else u), low, high


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

    @property
    def at_cell_start(self) -> bool:
        return True

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


@dataclass(frozen=True)
class Power(Quadrature):
    """Another rule under t = u^p: nodes crowd near the baseline, where gradients of networks concentrate.

    The weights are those of the other rule times p u^(p-1), scaled to sum to 1. In n the error falls as that of
    the other rule.

    Attributes:
        base: the rule for u; its n is ours.
        exponent: p, a whole number.

    >>> [round(t, 4) for t in Power(base=Midpoint(2)).rule()[0].tolist()]
    [0.0625, 0.5625]
    """

    base: Quadrature = Midpoint(32)
    exponent: int = 2
    n: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.base, Quadrature):
            object.__setattr__(self, "n", self.base.n)
        super().__post_init__()
        if self.exponent < 1 or not isinstance(self.base, Gauss | Midpoint | Trapezoid | Left | Right):
            raise ConfigError(
                f"Power(base={self.base}, exponent={self.exponent})",
                "a rule with fixed nodes and an exponent of at least 1",
                "write Power(base=Midpoint(32), exponent=2)",
            )

    @property
    def order(self) -> int:
        return max(1, self.base.order // self.exponent) if isinstance(self.base, Gauss) else 1

    def rule(self) -> tuple[Tensor, Tensor]:
        u, w = self.base.rule()
        w = w * self.exponent * u ** (self.exponent - 1)
        return u**self.exponent, w / w.sum()


@dataclass(frozen=True)
class MonteCarlo(Quadrature):
    """Random nodes with equal weights, drawn anew for each example and baseline (Erion et al. 2021).

    The error falls as n^(-1/2); drawn within n equal cells, as n^(-3/2) on smooth functions.

    Attributes:
        n: nodes for each baseline.
        stratified: draw one node in each of n equal cells rather than all of them anywhere.
    """

    n: int = 1
    stratified: bool = False

    @property
    def order(self) -> int:
        return 1 if self.stratified else 0

    @property
    def ordered(self) -> bool:
        return self.stratified

    def rule(self) -> tuple[Tensor, Tensor]:
        raise ConfigError("MonteCarlo.rule()", "a question to draw for", "call nodes(question)")

    def nodes(self, q: Question) -> Nodes:
        edges = torch.arange(self.n + 1, dtype=torch.float64, device=q.device) / self.n
        return RandomNodes(edges[:-1], edges, q.stream("quadrature"), self.stratified)


@dataclass(frozen=True)
class Adaptive(Quadrature):
    """Nodes placed where each path needs them, until the error is small or the budget is spent.

    Attributes:
        tolerance: the share of |f(x) - f(x')| that a path's gap may have; where that is next to nothing, of a
            thousandth of Σ|values|. A large number leaves the gap to itself.
        map_tolerance: the share of its own size (L2 norm) by which a path's map may be off, by estimate.
            A large number leaves the map to itself.
        max_passes: the most nodes a path gets.
        first: nodes every path gets at the start.
    """

    n: int = field(default=0, init=False)
    tolerance: float = 0.01
    map_tolerance: float = 0.05
    max_passes: int = 256
    first: int = 9

    _positive = ("max_passes",)

    @property
    def _least(self) -> int:
        return 0

    @property
    def order(self) -> int:
        return 2

    def rule(self) -> tuple[Tensor, Tensor]:
        raise ConfigError("Adaptive.rule()", "a rule with fixed nodes", "its nodes depend on the path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0 or self.map_tolerance < 0:
            raise ConfigError(
                f"Adaptive(tolerance={self.tolerance}, map_tolerance={self.map_tolerance})",
                "tolerances of at least 0",
                "write Adaptive(tolerance=0.01), for example",
            )
        if not 3 <= self.first <= self.max_passes:
            raise ConfigError(
                f"Adaptive(first={self.first}, max_passes={self.max_passes})",
                "3 ≤ first ≤ max_passes",
                "leave first out, and give max_passes of at least 9",
            )


def _equal(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)
