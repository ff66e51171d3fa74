"""Perturbations I of infidelity: what is taken from an example."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.baselines.simple import bounds_of


class Taken(NamedTuple):
    """Some perturbed rows.

    Attributes:
        rows: x - I.
        amount: I, which meets attributions per unit of input; or, as shares, I in units of the way from the baseline
            to x, which meets attributions in units of the score: 1 for an element that is removed, 0 where x is at the
            baseline, whose element has nothing to give.
    """

    rows: Tree
    amount: Tree


@dataclass(frozen=True, kw_only=True)
class Perturbation(Configurable):
    """Base of the perturbations.

    Attributes:
        baseline: x', where attributions in units of the score begin; several are used in turn.
    """

    example: ClassVar[str] = "ap.metrics.NoisyBaseline()"

    baseline: Baseline = Zero()

    @abstractmethod
    def count(self, q: Question) -> int:
        """Say how many perturbations each example gets."""

    @abstractmethod
    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], shares: bool) -> Taken:
        """Make perturbation number `draw` of each row's example, as steps or as shares of the way."""

    def _baselines(self, q: Question, owner: Tensor, draw: Tensor) -> Tree:
        rows = q.baseline_rows(self.baseline)
        first = tree.leaves(rows)[0]
        if first.shape[1] == 1:
            return tree.of_owners(tree.apply(lambda r: r[:, 0], rows), owner)
        return tree.apply(lambda r: r[owner, draw % r.shape[1]], rows)

    def _taken(self, q: Question, rows: Tree, owner: Tensor, draw: Tensor, shares: bool) -> Taken:
        step = tree.apply(lambda x, r: x[owner].sub_(r), q.x, rows)
        if not shares:
            return Taken(rows, step)

        def part(i: Tensor, x: Tensor, base: Tensor) -> Tensor:
            way = x[:, None] - base
            per_unit = torch.where(way == 0, 0, 1 / torch.where(way == 0, 1, way))
            per_unit = per_unit[:, 0][owner] if base.shape[1] == 1 else per_unit[owner, draw % base.shape[1]]
            return per_unit.mul_(i)

        return Taken(rows, tree.apply(part, step, q.x, q.baseline_rows(self.baseline)))


@dataclass(frozen=True)
class NoisyBaseline(Perturbation):
    """I = x - (x' + ε), ε ~ N(0, σ²): every element is replaced, by a baseline with noise.

    x' + ε is clipped to the field's declared bounds, as the authors clip theirs to [0, 1]; with none declared, not at
    all.

    Attributes:
        sigma: σ, in units of x.
        samples: draws; 10,000 in the authors' code.
        baseline: x'.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1), bounds=(0, 1)).bind(torch.full((1, 3), 0.5))
    >>> at = torch.zeros(5, dtype=torch.long)
    >>> taken = NoisyBaseline()(q, at, torch.arange(5), shares=True)
    >>> bool((taken.rows >= 0).all()), torch.equal(taken.amount, (0.5 - taken.rows) / 0.5)
    (True, True)
    """

    _not_negative = ("sigma",)
    _positive = ("samples",)

    sigma: float = 0.2
    samples: int = 10_000

    def count(self, q: Question) -> int:
        """As many as asked for."""
        return self.samples

    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], shares: bool) -> Taken:
        """Draw noise around the baselines."""
        start = self._baselines(q, owner, draw)
        noise = q.stream("infidelity").normal(q.x, owner, draw)
        low, high = bounds_of(q) or (None, None)
        rows = tree.apply(lambda s, n: n.mul_(self.sigma).add_(s), start, noise)
        rows = rows if low is None else tree.apply(lambda r: r.clamp(low, high), rows)
        return self._taken(q, rows, owner, draw, shares)


@dataclass(frozen=True)
class GaussianPerturbation(Perturbation):
    """I ~ N(0, σ²) in every element: how well attributions tell small changes all around x.

    Attributes:
        sigma: σ, in units of x; the paper names none.
        samples: draws.
        baseline: x', for attributions in units of the score only.
    """

    _positive = ("sigma", "samples")

    sigma: float
    samples: int = 1000

    def count(self, q: Question) -> int:
        """As many as asked for."""
        return self.samples

    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], shares: bool) -> Taken:
        """Draw steps."""
        noise = q.stream("infidelity").normal(q.x, owner, draw)
        rows = tree.apply(lambda x, n: x[owner] - self.sigma * n, q.x, noise)
        return self._taken(q, rows, owner, draw, shares)


@dataclass(frozen=True)
class SquareRemoval(Perturbation):
    """One k × k square of the picture, all channels, put to the baseline: I is x - x' inside, 0 elsewhere.

    Attributes:
        sides: every k; in pixels. Those longer than the picture are left out.
        samples: squares drawn from all of all sides, alike; or None for each of them once, as in the authors' code:
            about ten rows for every pixel.
        baseline: x'; zeros in the authors' code. With several, each square is put to each.

    Raises:
        ConfigError: no sides, or some below 1.
        InputError: no pictures [B, C, H, W], or a picture smaller than every square.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum((1, 2, 3))).bind(torch.ones(1, 1, 3, 3))
    >>> square = SquareRemoval((2,))
    >>> square.count(q), square(q, torch.tensor([0]), torch.tensor([3]), True).amount[0, 0].tolist()
    (4, [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    """

    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sides or min(self.sides) < 1 or len(set(self.sides)) < len(self.sides):
            raise ConfigError(f"sides={self.sides!r}", "different whole numbers from 1", "write sides=(1, 2, 3)")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples={self.samples!r}", "1 or more, or None for all squares", "write samples=1000")

    def _counts(self, q: Question) -> tuple[list[int], list[int]]:
        if not isinstance(q.x, Tensor) or q.x.ndim != 4:
            shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
            raise InputError(f"squares of input {shapes}", "one tensor [B, C, H, W]", "use ap.metrics.NoisyBaseline()")
        height, width = q.x.shape[2:]
        sides = [k for k in self.sides if k <= min(height, width)]
        if not sides:
            raise InputError(f"squares of side {self.sides} in {height} × {width} pixels", "one that fits", "shorter")
        return sides, [(height - k + 1) * (width - k + 1) for k in sides]

    def count(self, q: Question) -> int:
        """All that fit, or as many as asked for."""
        return self.samples or sum(self._counts(q)[1]) * self.baseline.draws

    def __call__(self, q: Question, owner: Owner, draw: Int[Tensor, " R"], shares: bool) -> Taken:
        """Remove squares."""
        sides, counts = self._counts(q)
        number = draw // self.baseline.draws
        if self.samples is not None:
            number = q.stream("infidelity").integers(sum(counts), owner, draw)[:, 0].to(draw.device)
        ends = torch.tensor(list(accumulate(counts)), device=draw.device)
        kind = torch.searchsorted(ends, number, right=True)
        side = torch.tensor(sides, device=draw.device)[kind]
        place = number - (ends - torch.tensor(counts, device=draw.device))[kind]
        across = q.x.shape[3] - side + 1
        inside = (_within(place // across, side, q.x.shape[2])[:, :, None]
                  & _within(place % across, side, q.x.shape[3])[:, None])[:, None]  # fmt: skip
        x, start = q.x[owner], self._baselines(q, owner, draw)
        rows = torch.where(inside, start, x)
        return Taken(rows, inside.to(x.dtype).expand_as(x) if shares else x - rows)


def _within(start: Tensor, length: Tensor, size: int) -> Tensor:
    at = torch.arange(size, device=start.device)
    return (at >= start[:, None]) & (at < (start + length)[:, None])


__all__ = ["GaussianPerturbation", "NoisyBaseline", "Perturbation", "SquareRemoval", "Taken"]
