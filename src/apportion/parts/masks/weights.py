"""Weights: how much the contribution of a player counts in coalitions of each size."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import comb
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError


@dataclass(frozen=True)
class SizeWeights(Configurable):
    """Base of the weights p of a semivalue φ_i = Σ_{S∌i} p(|S|) (v(S ∪ i) - v(S)), where Σ_s C(n-1, s) p(s) = 1."""

    example: ClassVar[str] = "ap.semivalues.ShapleyWeights()"

    @abstractmethod
    def of(self, players: int) -> Float[Tensor, " n"]:
        """Give p(s) for s = 0 to n - 1 others, in float64.

        Args:
            players: n, at least 1.
        """

    def sizes(self, players: int) -> list[int]:
        """Tell which sizes of coalitions count, in order.

        >>> LeaveOneOutWeights().sizes(5)
        [4, 5]
        """
        some = self.of(players).nonzero()[:, 0].tolist()
        return sorted({*some, *(s + 1 for s in some)})


@dataclass(frozen=True)
class ShapleyWeights(SizeWeights):
    """s! (n - s - 1)! / n!: every size counts alike, and so does every coalition of a size (Shapley 1953).

    >>> ShapleyWeights().of(3).tolist() == [1 / 3, 1 / 6, 1 / 3]
    True
    """

    def of(self, players: int) -> Tensor:
        return torch.tensor([1 / (players * comb(players - 1, s)) for s in range(players)], dtype=torch.float64)


@dataclass(frozen=True)
class BanzhafWeights(SizeWeights):
    """p^s (1 - p)^(n-1-s): each other player is there with probability p; 1/2 is Banzhaf's (1965).

    Attributes:
        p: strictly between 0 and 1.

    >>> BanzhafWeights().of(3).tolist()
    [0.25, 0.25, 0.25]
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p < 1:
            raise ConfigError(f"BanzhafWeights(p={self.p})", "0 < p < 1", "write BanzhafWeights(0.5)")

    def of(self, players: int) -> Tensor:
        s = torch.arange(players, dtype=torch.float64)
        return self.p**s * (1 - self.p) ** (players - 1 - s)


@dataclass(frozen=True)
class LeaveOneOutWeights(SizeWeights):
    """1 for all others together, 0 for less: v(N) - v(N without i), which is occlusion.

    >>> LeaveOneOutWeights().of(3).tolist()
    [0.0, 0.0, 1.0]
    """

    def of(self, players: int) -> Tensor:
        return torch.eye(players, dtype=torch.float64)[-1]


__all__ = ["BanzhafWeights", "LeaveOneOutWeights", "ShapleyWeights", "SizeWeights"]
