"""Selections: which features a surrogate may use."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apportion.core.config import Configurable
from apportion.parts.surrogate.regressions import Centered, Kept, PerFeature, Samples, Values, Weights, inverse_of


@dataclass(frozen=True)
class Selection(Configurable):
    """Base of selections."""

    example: ClassVar[str] = "ap.surrogates.Best(6)"

    @abstractmethod
    def __call__(self, z: Samples, v: Values, w: Weights, present: Kept, center: PerFeature) -> Kept:
        """Choose features.

        Args:
            z: samples of the features.
            v: the score at each.
            w: how much each counts.
            present: the features there are.
            center: the features of the example.
        """


@dataclass(frozen=True)
class Everything(Selection):
    """Keep all features."""

    def __call__(self, z: Samples, v: Values, w: Weights, present: Kept, center: PerFeature) -> Kept:
        return present


@dataclass(frozen=True)
class Forward(Selection):
    """Add the feature that raises the weighted R² of an unpenalized fit most, one after another.

    Attributes:
        count: features kept, at most.

    >>> z = torch.eye(3).double()
    >>> Forward(1)(z, torch.tensor([0.0, 5.0, 1.0]).double(), torch.ones(3).double(), torch.ones(3) > 0, torch.ones(3))
    tensor([False,  True, False])
    """

    _positive = ("count",)

    count: int = 6

    def __call__(self, z: Samples, v: Values, w: Weights, present: Kept, center: PerFeature) -> Kept:
        c = Centered.of(z, v, w, present)
        kept = torch.zeros_like(present)
        gram, cross = c.gram, c.cross
        least = 1e-12 * c.gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        for _ in range(min(self.count, z.shape[-1])):
            # what each feature still explains, given those chosen (partial correlations, by sweeping them out)
            own = gram.diagonal(dim1=-2, dim2=-1)
            usable = present & ~kept & (own > least)
            gain = torch.where(usable, cross.square() / torch.where(usable, own, 1), -1)
            best = gain.argmax(-1, keepdim=True)
            usable = usable.gather(-1, best)
            kept = kept.scatter(-1, best, kept.gather(-1, best) | usable)
            column = gram.gather(-1, best[..., None, :].expand(*gram.shape[:-1], 1)).squeeze(-1)
            share = torch.where(usable, column / torch.where(usable, own.gather(-1, best), 1), 0)
            cross = cross - share * cross.gather(-1, best)
            gram = gram - share[..., :, None] * column[..., None, :]
        return kept


@dataclass(frozen=True)
class HighestWeights(Selection):
    """Keep the features whose coefficient times the example's own value is largest in magnitude.

    Attributes:
        count: features kept, at most.
        alpha: the penalty of the fit that ranks them.
    """

    _positive = ("count",)
    _not_negative = ("alpha",)

    count: int = 10
    alpha: float = 0.01

    def __call__(self, z: Samples, v: Values, w: Weights, present: Kept, center: PerFeature) -> Kept:
        c = Centered.of(z, v, w, present)
        coefficients = (inverse_of(c.gram, self.alpha, present) @ c.cross[..., None]).squeeze(-1)
        return top((coefficients * center).abs(), self.count, present)


@dataclass(frozen=True)
class Best(Selection):
    """Up to 6 features one after another, more by their weights, as LIME's code chooses unless told otherwise.

    Attributes:
        count: features kept, at most.
    """

    _positive = ("count",)

    count: int = 10

    def __call__(self, z: Samples, v: Values, w: Weights, present: Kept, center: PerFeature) -> Kept:
        chosen = Forward(self.count) if self.count <= 6 else HighestWeights(self.count)
        return chosen(z, v, w, present, center)


def top(size: Tensor, count: int, present: Kept) -> Kept:
    """Mark the largest entries among those present; of equal ones the first."""
    order = torch.where(present, size, -1).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(present).scatter(-1, order, True) & present
