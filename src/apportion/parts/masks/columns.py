"""Groups of columns of a table: one-hot blocks, and columns that go together in data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.tree import Tree


def _table(like: Tree, columns: int, what: str) -> Tensor:
    if not isinstance(like, Tensor) or like.ndim != 2 or like.shape[1] != columns:
        shapes = [tuple(t.shape) for t in tree.leaves(like)]
        raise InputError(f"{what} of {columns} columns for input {shapes}", f"[B, {columns}]", "count the columns anew")
    return like


@dataclass(frozen=True)
class Columns(Configurable):
    """Neighbouring columns of a table together, such as the columns of one-hot categories.

    Attributes:
        widths: how many columns each player has, in order.

    >>> Columns((1, 3, 2)).labels(torch.zeros(4, 6)).tolist()
    [[0, 1, 1, 1, 2, 2]]
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"Columns({self.widths})", "widths from 1", "give 1 for a column by itself")

    def labels(self, like: Tree) -> Tree:
        """Number the blocks."""
        x = _table(like, sum(self.widths), "blocks")
        widths = torch.tensor(self.widths, device=x.device)
        return torch.arange(len(widths), device=x.device).repeat_interleave(widths)[None]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Correlated(Configurable):
    """Columns of a table that are correlated in data, as one player each cluster.

    Attributes:
        cluster: of each column, numbered by its first column.

    >>> a, b = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    >>> Correlated.fit(torch.stack([a, b, a + 0.1 * b], 1)).cluster.tolist()
    [0, 1, 0]
    """

    cluster: Int[Tensor, " F"]

    @classmethod
    def fit(cls, data: Float[Tensor, "n F"], closest: float = 0.5) -> Correlated:
        """Cluster columns by average linkage on the distance 1 - |r|, r the correlation of two columns.

        Args:
            data: rows of a table.
            closest: clusters are joined while the mean of 1 - |r| between them is below this.

        Returns:
            The clusters; a column that does not vary stays alone.

        Raises:
            InputError: data that are no table, have fewer than two rows, or are not finite.
            ConfigError: `closest` outside (0, 1].
        """
        if not isinstance(data, Tensor) or data.ndim != 2 or len(data) < 2 or not tree.is_finite(data.double()):
            given = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else kind_of(data)
            raise InputError(f"data of {given}", "finite rows [n, columns], n from 2", "give a table of numbers")
        if not 0 < closest <= 1:
            raise ConfigError(f"closest={closest}", "above 0, at most 1", "0.5 joins columns with |r| above one half")
        centred = data.double().cpu() - data.double().cpu().mean(0)
        size = centred.norm(dim=0)
        varies = size > 1e-12 * data.double().abs().amax(0).cpu().clamp(min=1e-300)
        unit = torch.where(varies, centred / size.where(varies, torch.ones_like(size)), torch.zeros_like(centred))
        apart = 1 - (unit.T @ unit).abs()
        apart.fill_diagonal_(torch.inf)
        members = torch.ones(len(apart), dtype=torch.float64)
        cluster = torch.arange(len(apart))
        while len(apart) > 1:
            flat = int(apart.argmin())
            i, j = sorted(divmod(flat, len(apart)))
            if not float(apart[i, j]) < closest:
                break
            joined = (members[i] * apart[i] + members[j] * apart[j]) / (members[i] + members[j])
            joined[[i, j]] = torch.inf
            apart[i], apart[:, i] = joined, joined
            apart[j], apart[:, j] = torch.inf, torch.inf
            members[i] += members[j]
            cluster[cluster == j] = i
        return cls(torch.unique(cluster, return_inverse=True)[1])

    def labels(self, like: Tree) -> Tree:
        """Give each column its cluster."""
        return self.cluster.to(_table(like, len(self.cluster), "clusters").device)[None]
