"""Curves: paths whose points are known beforehand, so that any quadrature can sample them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import ConfigError, NonFiniteError
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline
from apportion.parts.paths.adaptive import adaptive_walk
from apportion.parts.paths.path import Legs, Path, Walk, with_rises
from apportion.parts.quadrature import Adaptive, Gauss, Nodes, Quadrature


@dataclass(frozen=True)
class Curve(Path):
    """Base of the curves γ: [0, 1] → inputs with γ(1) = x.

    A node t of the quadrature with weight w stands for the stretch of length w around it: its cell. Cells lie
    side by side from 0 to 1, and a leg's move is the difference of the curve at the ends of its cell. Moves
    then sum to x - γ(0) for every curve, and linear scores come out exactly.

    Attributes:
        quadrature: where the gradient is taken on the curve, and with which weight.
    """

    quadrature: Quadrature = field(default=Gauss(32), kw_only=True)

    @property
    @abstractmethod
    def start(self) -> Baseline:
        """The starting points γ(0)."""

    @property
    def draws(self) -> int:
        return self.start.draws

    @property
    def same_with_rises(self) -> bool:
        return self.quadrature.ordered and self.quadrature.at_cell_start

    @abstractmethod
    def point(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        t: Float[Tensor, " R"],
    ) -> Tree:
        """Give γ(t) for each row, in the dtype of the examples."""

    def move(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        cell: tuple[Tensor, Tensor],
    ) -> Tree:
        """Give the displacement over each row's cell."""
        low, high = (self.point(q, start, owner, branch, end) for end in cell)
        return tree.apply(torch.sub, high, low)

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        if rises and not self.quadrature.ordered:
            raise ConfigError(
                f"{self.quadrature} for what needs the score's change over each leg",
                "a rule whose nodes lie in cells side by side",
                "take MonteCarlo(n, stratified=True), or Left(n)",
            )
        start = q.references(self.start)
        if isinstance(self.quadrature, Adaptive):
            return adaptive_walk(self, self.quadrature, q, start, rises=rises)
        legs = self._legs(q, start, rises)
        if rises:
            ends = partial(_ends, q, self.draws)
            return Walk(self.draws, with_rises(legs, len(q) * self.draws, ends), lambda: start)
        return Walk(self.draws, map(itemgetter(0), legs), lambda: start)

    def _legs(self, q: Question, start: References, rises: bool) -> Iterator[tuple[Legs, Tensor]]:
        """Give legs, with the score at the beginning of each one's cell where rises are wanted."""
        k, nodes = self.draws, self.quadrature.nodes(q)
        for step, owner in q.grid(nodes.count * k, "path"):
            # made elsewhere: what a generator has in its variables stays in memory while the next block runs
            yield self._block(q, start, nodes, owner, step // k, step % k, rises)

    def _block(
        self, q: Question, start: References, nodes: Nodes, owner: Tensor, node: Tensor, branch: Tensor, rises: bool
    ) -> tuple[Legs, Tensor]:
        t, low, high = nodes.at(node, owner, branch)
        point = self.point(q, start, owner, branch, t)
        value, grad = asked(q, point, owner, nodes)
        begin = value
        if rises:
            begin = torch.where(node == 0, start.value[owner, branch], value)
            other = ((t != low) & (node > 0)).nonzero()[:, 0]
            if len(other):
                at = owner[other], branch[other], low[other]
                begin = begin.index_copy(0, other, q.value(self.point(q, start, *at), at[0]))
        return Legs(owner, branch, t, point, value, grad, self.move(q, start, owner, branch, (low, high))), begin

    def passes(self, *, rises: bool = False) -> Passes:
        k = self.draws
        if isinstance(self.quadrature, Adaptive):
            n = self.quadrature.max_passes * k
            return self.start.added_to(Passes(n, n, at_x=1, exact=False))
        n = self.quadrature.n
        more = (n - 1) * k if rises and not self.quadrature.at_cell_start else 0
        return self.start.added_to(Passes(n * k + more, n * k, at_x=1))


def asked(q: Question, point: Tree, owner: Tensor, nodes: Nodes) -> tuple[Tensor, Tree]:
    """Ask for score and gradient at nodes, with advice where those at the ends may be to blame."""
    try:
        return q.value_and_grad(point, owner)
    except NonFiniteError as error:
        if not nodes.reaches_ends:
            raise
        advice = "take a quadrature without nodes at the ends of the path (Gauss, Midpoint)"
        raise error.advising(advice) from error


def _ends(q: Question, k: int) -> Tensor:
    """Give f(x) in the order of a step's rows: branch by branch, examples within."""
    return q.fx.repeat(k)
