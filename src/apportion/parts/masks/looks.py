"""Looks: after how many independent draws it is asked whether there are enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

N = TypeVar("N", int, Tensor)

LEAST = 16
"""Independent draws before their spread is trusted to tell whether there are enough."""


def later(units: N) -> N:
    """Tell when to look again: a quarter later."""
    return units + units // 4 + 1


def looks(most: int) -> Iterator[int]:
    """List the numbers of draws at which it is looked, below `most`.

    >>> list(looks(40))
    [16, 21, 27, 34]
    """
    at = LEAST
    while at < most:
        yield at
        at = later(at)


__all__ = ["LEAST", "later", "looks"]
