"""Games that a region of a picture is to win."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apportion.core.config import Configurable


@dataclass(frozen=True)
class Reward(Configurable):
    """Base of the games a region is to win; m is 1 in the region."""

    games: ClassVar[int] = 1

    @abstractmethod
    def masks(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Say what is kept in each game."""

    @abstractmethod
    def signs(self) -> tuple[int, ...]:
        """Say which way the score should go in each."""


@dataclass(frozen=True)
class Preserve(Reward):
    """The region alone keeps the score high."""

    def masks(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Keep the region."""
        return (mask,)

    def signs(self) -> tuple[int, ...]:
        """Upwards."""
        return (1,)


@dataclass(frozen=True)
class Delete(Reward):
    """All but the region has a low score."""

    def masks(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Keep the rest."""
        return (1 - mask,)

    def signs(self) -> tuple[int, ...]:
        """Downwards."""
        return (-1,)


@dataclass(frozen=True)
class Dual(Reward):
    """Both at once, two passes a step."""

    games: ClassVar[int] = 2

    def masks(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Keep one, then the other."""
        return (mask, 1 - mask)

    def signs(self) -> tuple[int, ...]:
        """Up for the region, down for the rest."""
        return (1, -1)
