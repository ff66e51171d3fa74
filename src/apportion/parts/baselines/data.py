"""Baselines out of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import BaselineError, kind_of
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines.simple import Baseline


def check_rows(data: Tree, what: str) -> int:
    """Count the rows of a data set.

    Args:
        data: a tensor or a tree of tensors, rows first.
        what: what it is, for messages.

    Raises:
        BaselineError: leaves that are no dense tensors, without rows, with different numbers of rows, or not finite.
    """
    flat = tree.leaves(data)
    for leaf in flat:
        if not isinstance(leaf, Tensor) or not tree.is_dense(leaf) or leaf.ndim == 0:
            given = kind_of(leaf) if not isinstance(leaf, Tensor) else "a sparse, nested or single-number tensor"
            raise BaselineError(f"{given} as {what}", "dense tensors, rows first", "convert it with torch.as_tensor")
    counts = sorted({len(leaf) for leaf in flat})
    if len(counts) != 1 or not counts[0]:
        raise BaselineError(
            f"{what} with {' and '.join(map(str, counts)) or 'no'} rows",
            "the same number in every tensor, at least one",
            "check how it was loaded",
        )
    if not tree.all_finite(data):
        raise BaselineError(f"{what} that is NaN or infinite somewhere", "finite values", "remove or repair those rows")
    return counts[0]


def like_input(q: Question, data: Tree, what: str, axes: int = 1) -> Tree:
    """Bring stored rows to the input's device, and to its dtype where the field sets the precision.

    Args:
        q: the question.
        data: [*axes, ...] stored points.
        what: what they are, for messages.
        axes: how many leading axes a point's own axes come after.

    Raises:
        BaselineError: another structure, shape or dtype than the input's.
    """

    def fit(x: Tensor, v: Tensor) -> Tensor:
        if tuple(v.shape[axes:]) != tuple(x.shape[1:]):
            raise BaselineError(
                f"{what} of shape {tuple(v.shape[axes:])} each for input {tuple(x.shape)}",
                f"shape {tuple(x.shape[1:])} each",
                "take points of the kind that is explained, prepared alike",
            )
        if q.field.precision is not None and v.is_floating_point():
            v = v.to(x.dtype)
        if v.dtype != x.dtype:
            raise BaselineError(f"{what} of {v.dtype}", f"{x.dtype}, as the input", "convert with .to(x.dtype)")
        return v.to(x.device)

    other = BaselineError(
        f"{what} named {tree.names(data)}", f"those of the input {tree.names(q.x)}", "give both one structure"
    )
    if sorted(tree.names(data)) != sorted(tree.names(q.x)):
        raise other
    try:
        return tree.apply(fit, q.x, data)
    except TypeError as error:
        raise other from error


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Data(Baseline):
    """Rows of a data set: the distribution D that expected gradients average over (Erion et al. 2021, eq. 3).

    Each example draws its own rows without replacement, by its random stream, so a larger count begins with
    the rows of a smaller one.

    Attributes:
        data: [n, ...] rows at the field's site, in units of x.
        count: rows per example; None for all of them, in order.

    Raises:
        BaselineError: a count above the number of rows, or rows that do not fit the input.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1)).bind(torch.zeros(1, 1))
    >>> Data(torch.tensor([[1.0], [2.0], [3.0]]))(q).tolist()
    [[[1.0], [2.0], [3.0]]]
    >>> len(set(Data(torch.arange(9.0)[:, None], count=4)(q).flatten().tolist()))
    4
    """

    data: Tree
    count: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        have = check_rows(self.data, "baseline data")
        if self.count is not None and not 1 <= self.count <= have:
            raise BaselineError(
                f"count={self.count} of {have} row(s), drawn without replacement",
                f"1 to {have}",
                "give more data, or leave count out for all rows",
            )

    @property
    def random(self) -> bool:
        return True

    @property
    def draws(self) -> int:
        return tree.rows(self.data) if self.count is None else self.count

    def __call__(self, q: Question) -> Tree:
        data, batch = like_input(q, self.data, "baseline data"), len(q)
        if self.count is None:
            return tree.apply(lambda t: t.expand(batch, *t.shape), data)
        owner = torch.arange(batch)
        keys = q.stream("baseline data").uniform(torch.zeros(1, tree.rows(data)), owner, torch.zeros_like(owner))
        chosen = keys.argsort(dim=1, stable=True)[:, : self.count]  # the rows of smallest key are a random subset
        return tree.apply(lambda t: t[chosen.to(t.device)], data)


@dataclass(frozen=True, eq=False)
class DataMean(Baseline):
    """The mean of a data set, element by element: x' = (1/n) Σ_j r_j; `Mean` is the example's own.

    Attributes:
        value: the mean, shaped as one example.

    Raises:
        BaselineError: a mean of another shape or dtype than the examples.

    >>> import apportion as ap
    >>> mean = DataMean.fit([torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[6.0, 3.0]])])
    >>> mean(ap.Field(lambda x: x.sum(1)).bind(torch.zeros(1, 2)))
    tensor([[[3., 1.]]])
    """

    value: Tree

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows(tree.apply(lambda t: t[None] if isinstance(t, Tensor) else t, self.value), "a mean")

    @classmethod
    def fit(cls, batches: Iterable[Tree]) -> DataMean:
        """Average over batches, one in memory at a time; sums are kept in float64.

        Args:
            batches: inputs with rows first, without labels; one tensor is one batch.

        Returns:
            The mean, in the dtype of the batches.

        Raises:
            BaselineError: no batches, batches of different structure, shape or dtype, or with integers.
        """
        total: Any = None
        kind: Any = None
        first: Any = None
        count = 0
        batches = [batches] if isinstance(batches, Tensor | Mapping) else batches
        if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
            raise BaselineError(
                f"{kind_of(batches)} as batches",
                "an iterable of batches, or one tensor",
                "pass a loader, without labels",
            )
        for batch in batches:
            have = check_rows(batch, "a batch to average")
            whole = next((t.dtype for t in tree.leaves(batch) if not t.is_floating_point()), None)
            if whole is not None:
                raise BaselineError(
                    f"a batch with a tensor of {whole}",
                    "floating-point inputs, without labels",
                    "write DataMean.fit(x for x, _ in loader), or convert the inputs with .float()",
                )
            now = tree.names(batch), [(tuple(t.shape[1:]), t.dtype) for t in tree.leaves(batch)]
            if kind is None:
                kind, first = now, batch
                total = tree.apply(lambda t: t.new_zeros(t.shape[1:], dtype=torch.float64), batch)
            if now != kind:
                raise BaselineError(
                    f"a batch of {now[0]}: {now[1]} after one of {kind[0]}: {kind[1]}",
                    "batches of one structure, shape and dtype",
                    "leave labels out, and bring all rows to one shape",
                )
            total = tree.apply(lambda s, t: s + t.double().sum(0), total, batch)
            count += have
        if not count:
            raise BaselineError("no batches to average", "at least one", "an iterator is spent after one use")
        return cls(tree.apply(lambda s, t: (s / count).to(t.dtype), total, first))

    def __call__(self, q: Question) -> Tree:
        value = like_input(q, tree.apply(lambda t: t[None], self.value), "the data's mean")
        return tree.apply(lambda t: t.expand(len(q), *t.shape[1:])[:, None], value)
