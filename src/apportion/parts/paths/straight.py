"""The straight line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.paths.curve import Curve


@dataclass(frozen=True)
class Straight(Curve):
    """γ(t) = x' + t (x - x').

    Attributes:
        baseline: the starting point x'.
    """

    baseline: Baseline = Zero()

    @property
    def start(self) -> Baseline:
        return self.baseline

    def point(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        t: Float[Tensor, " R"],
    ) -> Tree:
        def between(r: Tensor, x: Tensor) -> Tensor:
            return torch.lerp(r[owner, branch], x[owner], tree.per_row(t, x))

        return tree.apply(between, start.rows, q.x)

    def move(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        cell: tuple[Tensor, Tensor],
    ) -> Tree:
        length = cell[1] - cell[0]
        return tree.apply(lambda r, x: (x[owner] - r[owner, branch]) * tree.per_row(length, x), start.rows, q.x)
