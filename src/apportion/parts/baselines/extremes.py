"""Baselines at the ends of the admissible range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import BaselineError
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines.simple import Baseline, needed_bounds, no_bounds


@dataclass(frozen=True)
class _Ends(Baseline):
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is None and self.high is None:
            return
        if self.low is None or self.high is None or not self.low < self.high:
            raise BaselineError(
                f"{type(self).__name__}(low={self.low}, high={self.high})",
                "both with low < high, or neither",
                "give both ends, or leave both out to take the field's bounds",
            )

    def check(self, field: Field) -> None:
        if self.low is None and field.bounds is None:
            raise no_bounds(field, type(self).__name__, "give low and high")

    def ends(self, q: Question) -> tuple[float, float]:
        """Give the ends: one's own, or else the field's bounds."""
        if self.low is None or self.high is None:
            return needed_bounds(q, type(self).__name__, "give low and high")
        return self.low, self.high


@dataclass(frozen=True)
class MaximumDistance(_Ends):
    """Each element at the end of the range farthest from it: x' = argmax of |x - v| over v in {low, high}.

    No element equals its baseline, so none gets 0 by construction. Exactly between the two it is `low`.

    Attributes:
        low: the lowest value, in units of x; None for the field's bounds.
        high: the highest value.

    Raises:
        BaselineError: no bounds declared and none given.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1), bounds=(0, 1)).bind(torch.tensor([[0.1, 0.9, 0.5]]))
    >>> MaximumDistance()(q)
    tensor([[[1., 0., 0.]]])
    """

    def __call__(self, q: Question) -> Tree:
        low, high = self.ends(q)

        def far(x: Tensor) -> Tensor:
            below, above = x.new_tensor(low), x.new_tensor(high)
            return torch.where(x - below >= above - x, below, above)[:, None]

        return tree.apply(far, q.x)


@dataclass(frozen=True)
class BlackWhite(_Ends):
    """Two constant baselines, the lowest value and the highest: black and white for pictures.

    What is black in the picture gets nothing from the first and something from the second, and the reverse.

    Attributes:
        low: the first one's value, in units of x; None for the field's bounds.
        high: the second one's value.

    Raises:
        BaselineError: bounds neither declared nor given.

    >>> import apportion as ap
    >>> BlackWhite(-1, 1)(ap.Field(lambda x: x.sum(1)).bind(torch.zeros(1, 2)))
    tensor([[[-1., -1.],
             [ 1.,  1.]]])
    """

    @property
    def draws(self) -> int:
        return 2

    def __call__(self, q: Question) -> Tree:
        ends = self.ends(q)

        def pair(x: Tensor) -> Tensor:
            return x.new_tensor(ends).reshape(1, 2, *[1] * (x.ndim - 1)).expand(len(x), 2, *x.shape[1:])

        return tree.apply(pair, q.x)
