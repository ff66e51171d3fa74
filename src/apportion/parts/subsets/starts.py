"""Where the search for a mask starts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.score import Score
from apportion.parts.baselines.simple import blur
from apportion.parts.subsets.pictures import pictures


@dataclass(frozen=True)
class MaskStart(Configurable):
    """Base of where the search for a mask starts; 1 keeps, 0 removes."""

    @property
    def rows(self) -> int:
        """Rows sent forward per example."""
        return 0

    @abstractmethod
    def __call__(self, q: Question, owner: Owner, cells: tuple[int, int], hidden: Tensor, score: Score) -> Tensor:
        """Give the mask's cells, [R, 1, *cells], for the examples named by `owner`.

        Args:
            q: the question.
            owner: the examples.
            cells: rows and columns of the mask.
            hidden: what stands where the mask is 0, for each of them.
            score: what is to be taken away.
        """


@dataclass(frozen=True)
class UniformStart(MaskStart):
    """Random cells from U(0, 1), from the question's streams."""

    def __call__(self, q: Question, owner: Owner, cells: tuple[int, int], hidden: Tensor, score: Score) -> Tensor:
        """Draw them."""
        x = pictures(q, "a mask")
        return q.stream("mask start").uniform(x.new_zeros(1, 1, *cells), owner, torch.zeros_like(owner))


@dataclass(frozen=True)
class CircleStart(MaskStart):
    """The smallest of some blurred discs in the middle that takes the score away; Fong and Vedaldi 2017.

    Attributes:
        count: radii tried, from 0 to three quarters of the longer side.
        left: the share of the way from the largest disc's score to f(x) that may be left.
        sigma: of the blur of the discs, in pixels.
    """

    _positive = ("count",)
    _not_negative = ("left", "sigma")

    count: int = 35
    left: float = 0.01
    sigma: float = 10.0

    @property
    def rows(self) -> int:
        return self.count

    def __call__(self, q: Question, owner: Owner, cells: tuple[int, int], hidden: Tensor, score: Score) -> Tensor:
        """Try them all, and take the largest where none will do."""
        x = pictures(q, "a mask")
        kept = 1 - self.discs(x)
        value = torch.stack([q.value(x[owner] * m + hidden * (1 - m), owner, score) for m in kept], 1)
        first, last = value[:, :1], value[:, -1:]  # the first disc has radius 0
        enough = (value - last) <= self.left * (first - last)
        enough[:, -1] = True
        found = enough.to(torch.uint8).argmax(1)
        return F.interpolate(kept[:, None], cells, mode="area")[found]

    def discs(self, x: Tensor) -> Float[Tensor, "n H W"]:
        """Draw the discs, 1 inside."""
        high, wide = x.shape[2:]
        down, across = (torch.arange(n, device=x.device, dtype=x.dtype) - n // 2 for n in (high, wide))
        squares = down[:, None] ** 2 + across**2
        radii = torch.linspace(0, 0.75 * max(high, wide), self.count, device=x.device, dtype=x.dtype)
        inside = ((squares <= radii[:, None, None] ** 2) & (radii > 0)[:, None, None]).to(x.dtype)
        return blur(inside[:, None], self.sigma)[:, 0] if self.sigma else inside
