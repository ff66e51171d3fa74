"""Neighborhoods of rows of a table, learned from its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Kind
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.surrogate.neighborhoods import Local, Neighborhood, Points, flat, laid_out


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Bins(Configurable):
    """How the columns of a table are cut into intervals, and what data lie in each.

    Attributes:
        edges: upper ends, included, infinite beyond a column's last; columns hold their values instead where these
            are categories.
        share: of the data, in each interval.
        mean: of the data there.
        deviation: likewise.
        low: the interval's lower end, within the range of the data.
        high: likewise its upper end.
    """

    edges: Float[Tensor, "P K"]
    share: Float[Tensor, "P K"]
    mean: Float[Tensor, "P K"]
    deviation: Float[Tensor, "P K"]
    low: Float[Tensor, "P K"]
    high: Float[Tensor, "P K"]

    @classmethod
    def fit(cls, data: Float[Tensor, "n P"], categorical: Sequence[int] = (), quantiles: int = 4) -> Bins:
        """Cut each column at its quantiles, or between its values where it is one of categories."""
        if wrong := [j for j in categorical if j not in range(data.shape[1])]:
            raise ConfigError(
                f"categorical={wrong} of a table of {data.shape[1]} columns",
                f"0 to {data.shape[1] - 1}",
                "count from 0",
            )
        columns = [
            _categories(data[:, j]) if j in set(categorical) else _quantiles(data[:, j], quantiles)
            for j in range(data.shape[1])
        ]
        width = max(len(column[0]) for column in columns)
        fills = (float("inf"), 0.0, 0.0, 0.0, 0.0, 0.0)
        made = []
        for what, fill in enumerate(fills):
            rows = [torch.cat([c[what], c[what].new_full((width - len(c[what]),), fill)]) for c in columns]
            made.append(torch.stack(rows))
        return cls(*made)

    def find(self, x: Float[Tensor, "R P"]) -> Int[Tensor, "R P"]:
        """Number the interval of each value; those beyond the data are in the last one at their end."""
        return torch.searchsorted(self.edges.to(x.device), x.T.contiguous()).T.clamp(max=self.edges.shape[1] - 1)


def _categories(column: Tensor) -> tuple[Tensor, ...]:
    values, counts = column.unique(return_counts=True)
    edges = torch.cat([(values[1:] + values[:-1]) / 2, values.new_full((1,), float("inf"))])
    return edges, counts / len(column), values, torch.zeros_like(values), values, values


def _quantiles(column: Tensor, count: int) -> tuple[Tensor, ...]:
    ordered = column.sort().values  # torch.quantile takes no more than 16 million
    at = torch.linspace(0, 1, count + 1, dtype=column.dtype)[1:-1] * (len(column) - 1)
    cuts = torch.lerp(ordered[at.floor().long()], ordered[at.ceil().long()], at - at.floor()).unique()
    edges = torch.cat([cuts, cuts.new_full((1,), float("inf"))])
    inside = torch.searchsorted(edges, column.contiguous())
    held = torch.bincount(inside, minlength=len(edges)).to(column)
    mean = torch.bincount(inside, column, len(edges)) / held.clamp(min=1)
    deviation = (torch.bincount(inside, (column - mean[inside]).square(), len(edges)) / held.clamp(min=1)).sqrt()
    low, high = torch.cat([column.min()[None], cuts]), torch.cat([cuts, column.max()[None]])
    return edges, held / len(column), mean, deviation, low, high


@dataclass(frozen=True)
class Quartiles(Neighborhood):
    """Columns cut at the quartiles of the data; the surrogate sees whether a sample lies in the example's interval.

    A sample's intervals are drawn by how much of the data each holds, column by column, wherever the example lies:
    the samples are those of the data's marginals, not of the example's surroundings. Within an interval values are
    normal, cut off at its ends. A coefficient is what it does to the score to be in the example's interval.

    Attributes:
        bins: learned by `fit`.
    """

    bins: Bins | None = None

    @classmethod
    def fit(cls, data: Tensor, categorical: Sequence[int] = ()) -> Quartiles:
        """Learn the intervals.

        Args:
            data: rows [n, ...] of the table.
            categorical: columns whose values are categories, each an interval of its own.

        >>> Quartiles.fit(torch.arange(9.0)[:, None]).bins.edges
        tensor([[2., 4., 6., inf]], dtype=torch.float64)
        """
        return cls(Bins.fit(_table(data), categorical))

    def fitted(self, data: Tree) -> Neighborhood:
        return self if self.bins is not None else Quartiles(Bins.fit(_table(flat(data))))

    def around(self, q: Question) -> Local:
        if self.bins is None:
            raise ConfigError("Quartiles() without data", "intervals learned from a table", "write Quartiles.fit(data)")
        _fits(q, self.bins.edges.shape[0])
        return _Binned(q, self.bins)


class _Binned(Points):
    if_poor = "take the columns themselves instead of their quartiles, or a narrower kernel"
    if_idle = "the table has one value there, or next to nothing elsewhere: its effect is unknown, not 0"

    def __init__(self, q: Question, bins: Bins) -> None:
        super().__init__(q, own=1)
        self.bins = bins
        x = flat(q.x)
        self.at = bins.find(x)
        column = torch.arange(x.shape[1], device=x.device)
        low, high = (end.to(x)[column, self.at] for end in (bins.low, bins.high))
        new = (low == high) & ((x - low).abs() > 1e-6 * low.abs().clamp(min=1e-6))
        if bool(new.any()):
            b, j = new.nonzero()[0].tolist()
            q.warn(
                f"{float(x[b, j]):g} in column {j} of example {b} is not in the table, and counts as "
                f"{float(low[b, j]):g}: what is said of that column is not about it"
            )
        self.center = torch.ones_like(flat(q.x))
        self.present = torch.ones_like(self.center, dtype=torch.bool)

    def sample(self, run: int, owner: Owner, draw: Owner) -> tuple[Tree, Tensor]:
        q, bins, columns = self.q, self.bins, self.center.shape[1]
        like = torch.zeros(1, columns, dtype=torch.float64, device=q.device)
        below = bins.share.to(like).cumsum(1)
        which = q.stream(f"intervals of a table, run {run}").uniform(like, owner, draw)
        chosen = torch.searchsorted(below, which.T.contiguous()).T.clamp(max=below.shape[1] - 1)
        column = torch.arange(columns, device=q.device)

        def of(table: Tensor) -> Tensor:
            return table.to(like)[column, chosen]

        low, high, mean, deviation = of(bins.low), of(bins.high), of(bins.mean), of(bins.deviation)
        flatly = deviation <= 0
        scale = torch.where(flatly, 1, deviation)
        first, last = (torch.special.ndtr((end - mean) / scale) for end in (low, high))
        level = first + (last - first) * q.stream(f"values in an interval, run {run}").uniform(like, owner, draw)
        inside = mean + scale * torch.special.ndtri(level.clamp(1e-12, 1 - 1e-12))
        values = torch.where(flatly, mean, torch.maximum(torch.minimum(inside, high), low))
        return laid_out(values, tree.index(q.x, owner)), (chosen == self.at[owner]).double()


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class NormalRows(Neighborhood):
    """Columns drawn from normal distributions with the data's deviations; the surrogate sees standardized values.

    Coefficients are scores per standard deviation of a column.

    Attributes:
        mean: of each column, learned by `fit`.
        deviation: likewise.
        around_x: draw around the example; otherwise around the data's mean, as LIME's code does unless told
            otherwise, however far from the example that is.
    """

    kind: ClassVar[Kind] = Kind.SENSITIVITY

    mean: Tensor | None = None
    deviation: Tensor | None = None
    around_x: bool = False

    @classmethod
    def fit(cls, data: Tensor, around_x: bool = False) -> NormalRows:
        """Learn means and deviations from rows [n, ...] of a table.

        >>> NormalRows.fit(torch.tensor([[1.0], [3.0]])).deviation
        tensor([1.], dtype=torch.float64)
        """
        table = _table(data)
        return cls(table.mean(0), _deviation(table), around_x)

    def fitted(self, data: Tree) -> Neighborhood:
        if self.mean is not None:
            return self
        table = _table(flat(data))
        return NormalRows(table.mean(0), _deviation(table), self.around_x)

    def around(self, q: Question) -> Local:
        if self.mean is None or self.deviation is None:
            raise ConfigError("NormalRows() without data", "means learned from a table", "write NormalRows.fit(data)")
        _fits(q, len(self.mean))
        return _Normal(q, self.mean, self.deviation, self.around_x)


class _Normal(Points):
    def __init__(self, q: Question, mean: Tensor, deviation: Tensor, around_x: bool) -> None:
        super().__init__(q, own=1)
        x = flat(q.x)
        self.mean, self.deviation = mean.to(x), deviation.to(x)
        self.center = (x - self.mean) / self.deviation
        self.if_poor = f"{'' if around_x else 'sample around the example, or '}take a narrower kernel"
        self.middle = self.center if around_x else torch.zeros_like(self.center)
        self.present = torch.ones_like(self.center, dtype=torch.bool)

    def sample(self, run: int, owner: Owner, draw: Owner) -> tuple[Tree, Tensor]:
        noise = self.q.stream(f"rows of a table, run {run}").normal(self.center[:1], owner, draw)
        z = self.middle[owner] + noise
        return laid_out(self.mean + self.deviation * z, tree.index(self.q.x, owner)), z


def table_rows(data: Tensor, categorical: Sequence[int], continuous: bool, around_x: bool) -> Neighborhood:
    """Learn `NormalRows` where columns are taken as continuous, and `Quartiles` otherwise.

    Raises:
        ConfigError: what only the other of them takes.
    """
    if (around_x and not continuous) or (continuous and len(categorical)):
        given = "around_x=True without continuous" if around_x and not continuous else "categorical beside continuous"
        raise ConfigError(
            given, "intervals with categories, or normal rows around x", "leave it out, or set continuous"
        )
    return NormalRows.fit(data, around_x) if continuous else Quartiles.fit(data, categorical)


def _table(data: Tensor) -> Float[Tensor, "n P"]:
    if not isinstance(data, Tensor) or data.ndim < 2 or len(data) < 2 or not bool(torch.isfinite(data).all()):
        shape = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise InputError(
            f"data {shape} to learn a table from", "a finite tensor [n, columns] of two rows or more", "give its rows"
        )
    return data.detach().flatten(1).double().cpu()


def _deviation(table: Tensor) -> Tensor:
    found = table.std(0, unbiased=False)
    return torch.where(found > 0, found, 1)  # a constant column has no unit of its own


def _fits(q: Question, columns: int) -> None:
    have = flat(q.x).shape[1]
    if have != columns:
        raise InputError(
            f"{have} numbers per example, for a neighborhood learned from {columns} columns",
            "rows of the same table",
            "fit the neighborhood to data shaped as the examples",
        )
