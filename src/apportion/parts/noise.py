"""Noise: how copies of an example are perturbed."""

from __future__ import annotations

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
class Gaussian(Configurable):
    """x + s n with n ~ N(0, 1), before the declared normalization.

    Attributes:
        sigma: the standard deviation s, in units of x, or as a share of each example's range.
        relative: whether sigma is a share of max(x) - min(x) per example (Smilkov et al. 2017).
    """

    example: ClassVar[str] = "ap.noise.Gaussian(0.15)"
    _positive = ("sigma",)

    sigma: float = 0.15
    relative: bool = True

    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        """Make noisy copies: rows [R, ...]."""
        n = q.stream("noise").normal(q.x, owner, draw)

        def add(x: Tensor, noise: Tensor) -> Tensor:
            rows = x[owner]
            if not self.relative:
                return rows + self.sigma * noise
            flat = rows.reshape(len(rows), -1)
            width = flat.amax(1) - flat.amin(1)
            if not bool(width.all()):
                q.warn("an example is constant: noise relative to its range is 0 there")
            return rows + tree.per_row(self.sigma * width, rows) * noise

        rows = tree.apply(add, q.x, n)
        bounds = q.field.bounds
        if bounds is not None and isinstance(q.field.site, Input):
            low, high = bounds
            if any(bool(((t < low) | (t > high)).any()) for t in tree.leaves(rows)):
                q.warn(f"noisy copies leave the declared bounds {bounds}; they are not clipped")
        return rows
