"""Noise: how copies of an example are perturbed."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.site import Input
from apportion.core.tree import Tree


@dataclass(frozen=True)
class NoiseModel(Configurable):
    """Base of the noises: noisy copies of the examples of a question."""

    example: ClassVar[str] = "ap.noise.Gaussian(0.15)"

    @abstractmethod
    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], purpose: str = "noise") -> Tree:
        """Make noisy copies: rows [R, ...], from the question's random stream of that purpose."""


@dataclass(frozen=True)
class Gaussian(NoiseModel):
    """x + s n with n ~ N(0, 1), before the declared normalization.

    Attributes:
        sigma: the standard deviation s, in units of x, or as a share of each example's range.
        relative: whether sigma is a share of max(x) - min(x) per example (Smilkov et al. 2017).
    """

    _positive = ("sigma",)

    sigma: float = 0.15
    relative: bool = True

    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], purpose: str = "noise") -> Tree:
        n = q.stream(purpose).normal(q.x, owner, draw)

        def add(x: Tensor, noise: Tensor) -> Tensor:
            rows = x[owner]
            if not self.relative:
                return noise.mul_(self.sigma).add_(rows)
            flat = rows.reshape(len(rows), -1)
            width = flat.amax(1) - flat.amin(1)
            if not bool(width.all()):
                q.warn("an example is constant: noise relative to its range is 0 there")
            return noise.mul_(tree.per_row(self.sigma * width, rows)).add_(rows)

        return _told(q, tree.apply(add, q.x, n))


@dataclass(frozen=True)
class UniformBox(NoiseModel):
    """x + δ with each element of δ ~ U(-r, r): a draw from the box around x.

    Attributes:
        radius: r, in units of x.

    >>> import torch, apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1)).bind(torch.ones(1, 100))
    >>> away = UniformBox(0.2)(q, torch.tensor([0]), torch.tensor([0])) - 1
    >>> bool(away.abs().max() < 0.2), bool(away.abs().max() > 0.18)
    (True, True)
    """

    _positive = ("radius",)

    radius: float = 0.2

    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], purpose: str = "noise") -> Tree:
        u = q.stream(purpose).uniform(q.x, owner, draw)
        return _told(q, tree.apply(lambda x, n: n.mul_(2).sub_(1).mul_(self.radius).add_(x[owner]), q.x, u))


def _told(q: Question, rows: Tree) -> Tree:
    """Give noisy copies, with a warning where they leave the bounds."""
    bounds = q.field.bounds
    if bounds is not None and isinstance(q.field.site, Input):
        low, high = bounds
        if any(bool(((t < low) | (t > high)).any()) for t in tree.leaves(rows)):
            q.warn(f"noisy copies leave the declared bounds {bounds}; they are not clipped")
    return rows
