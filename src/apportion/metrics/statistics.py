"""Statistics over the last axis, a batch at a time; NaN where they are undefined."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable

NOISE = 64
"""Units in the last place by which numbers that are equal on paper may differ."""


def is_constant(values: Float[Tensor, "*b N"]) -> Bool[Tensor, "*b"]:
    """Tell where all N numbers are one number, up to rounding in their own dtype.

    Sums of equal terms in another order differ in the last digits, and a correlation would be one of those.

    >>> is_constant(torch.tensor([[0.1 + 0.2, 0.3], [0.1, 0.2]], dtype=torch.float64))
    tensor([ True, False])
    """
    size = values.abs().amax(-1)
    return values.amax(-1) - values.amin(-1) <= NOISE * torch.finfo(values.dtype).eps * size


def ranks(values: Float[Tensor, "*b N"]) -> Float[Tensor, "*b N"]:
    """Rank numbers from 1; equal ones share the mean of their places.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0]))
    tensor([3.5000, 1.0000, 3.5000, 2.0000], dtype=torch.float64)
    """
    order = argsort(values)
    ordered, at = values.gather(-1, order), torch.arange(values.shape[-1], device=values.device)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    place = at.expand(values.shape) + tree.wide(values.new_tensor(1.0))
    tied = ~new.all(-1)
    if bool(tied.any()):  # of few rows mostly, as single numbers are equal by chance
        new = new[tied]
        first = (at * new).cummax(-1).values
        last = (at + len(at) * ~new.roll(-1, -1)).flip(-1).cummin(-1).values.flip(-1)
        place[tied] = (first + last) / tree.wide(values.new_tensor(2.0)) + 1
    return torch.zeros_like(place).scatter_(-1, order, place)


def levels(values: Float[Tensor, "*b N"], rounding: float = 0.0) -> Int[Tensor, "*b N"]:
    """Number the distinct values from 0, the lowest; those that rounding may tell from the lowest of a level are of it.

    Args:
        values: numbers; each NaN is a value of its own.
        rounding: the share of the greater of two by which they may differ.

    >>> levels(torch.tensor([3.0, 1.0, 3.0000001, 2.0]), 1e-6)
    tensor([2, 0, 2, 1])
    """
    order = argsort(values)
    v = values.gather(-1, order)
    if not v.shape[-1]:
        return order
    new = torch.ones_like(v, dtype=torch.bool)
    new[..., 1:] = ~((v[..., :-1] == v[..., 1:]) | (v[..., 1:] <= _reach(v[..., :-1], rounding)))
    start = (torch.arange(v.shape[-1], device=v.device) * new).cummax(-1).values
    wide = (v > _reach(v.gather(-1, start), rounding)) & ~new  # a chain of neighbours may go farther than rounding does
    if bool(wide.any()):
        rows, starts, cuts = (t.reshape(-1, v.shape[-1]) for t in (v, new, wide))
        for at in cuts.any(1).nonzero()[:, 0].tolist():
            _cut(rows[at], starts[at], cuts[at], rounding)
    return torch.zeros_like(order).scatter_(-1, order, new.long().cumsum(-1) - 1)


def _reach(low: Float[Tensor, "*b N"], rounding: float) -> Float[Tensor, "*b N"]:
    """Give the highest number that differs from one by a share of the greater of both."""
    return torch.where(low > 0, low / (1 - rounding), low * (1 - rounding))


def _cut(v: Float[Tensor, " N"], new: Bool[Tensor, " N"], wide: Bool[Tensor, " N"], rounding: float) -> None:
    """Begin a level wherever one gets too wide."""
    row, begun = v.detach().cpu().numpy(), new.nonzero()[:, 0].cpu().numpy()
    reach = _reach(v, rounding).detach().cpu().numpy()
    chains = np.unique(np.searchsorted(begun, wide.nonzero()[:, 0].cpu().numpy(), side="right") - 1)
    for chain in chains.tolist():
        at, end = int(begun[chain]), int(begun[chain + 1]) if chain + 1 < len(begun) else len(row)
        while (at := at + int(np.searchsorted(row[at:end], reach[at], side="right"))) < end:
            new[at] = True


def leveled(values: Float[Tensor, "*b N"], rounding: float) -> Float[Tensor, "*b N"]:
    """Make numbers that are one of `levels` one number, the lowest of them.

    >>> leveled(torch.tensor([3.0, 1.0, 3.0000002]), 1e-6)
    tensor([3., 1., 3.])
    """
    place = levels(values, rounding)
    return torch.zeros_like(values).scatter_reduce_(-1, place, values, "amin", include_self=False).gather(-1, place)


def argsort(values: Float[Tensor, "*b N"]) -> Int[Tensor, "*b N"]:
    """Sort in ascending order, equal numbers anyhow; on a CPU by NumPy, which takes a quarter of torch's time.

    >>> argsort(torch.tensor([3.0, 1.0, 2.0]))
    tensor([1, 2, 0])
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.argsort(-1)
    return torch.from_numpy(np.argsort(values.detach().numpy(), axis=-1))


@dataclass(frozen=True)
class Correlation(Configurable):
    """Base of the correlations: two rows of numbers in, one number in [-1, 1] out."""

    example: ClassVar[str] = "ap.metrics.Pearson()"

    @abstractmethod
    def __call__(self, a: Float[Tensor, "*b N"], b: Float[Tensor, "*b N"]) -> Float[Tensor, "*b"]:
        """Correlate along the last axis; NaN where a side is constant."""


@dataclass(frozen=True)
class Pearson(Correlation):
    """Σ (a - ā)(b - b̄) / √(Σ (a - ā)² Σ (b - b̄)²): how nearly one side is a linear function of the other.

    >>> Pearson()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    tensor(1., dtype=torch.float64)
    """

    def __call__(self, a: Float[Tensor, "*b N"], b: Float[Tensor, "*b N"]) -> Float[Tensor, "*b"]:
        found = _cosine(_centered(a), _centered(b))
        return found.masked_fill(is_constant(a) | is_constant(b), torch.nan)


@dataclass(frozen=True)
class Spearman(Correlation):
    """The Pearson correlation of ranks, ties sharing the mean of their places.

    >>> Spearman()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -8.0, -9.0]))
    tensor(-1., dtype=torch.float64)
    """

    def __call__(self, a: Float[Tensor, "*b N"], b: Float[Tensor, "*b N"]) -> Float[Tensor, "*b"]:
        return self.to(a)(b)

    def to(self, a: Float[Tensor, "*b N"]) -> Callable[[Tensor], Float[Tensor, "*b"]]:
        """Correlate many with one, which is ranked once."""
        ranked, constant = _centered(ranks(a)), is_constant(a)
        return lambda b: _cosine(ranked, _centered(ranks(b))).masked_fill(constant | is_constant(b), torch.nan)


def _centered(values: Tensor) -> Tensor:
    values = tree.wide(values)
    away = values - values.mean(-1, keepdim=True)
    return away / away.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(away.dtype).tiny)  # squares must not vanish


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return ((a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()).clamp(-1, 1)


__all__ = ["Correlation", "Pearson", "Spearman", "argsort", "is_constant", "leveled", "levels", "ranks"]
