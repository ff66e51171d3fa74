"""The conditional distribution of absent features, exactly, from a table of all that can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.game import Weighted
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines.data import like_input
from apportion.parts.masks.fill import Fill, hard


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Conditional(Fill):
    """p(x' | x'_S = x_S) of a discrete joint distribution: the rows of a table that agree with what is kept.

    With the score p(y | x) and `reduce="mean_of_score"` this makes v(S) = p(y | x_S) exactly. Rows that do not agree
    are not evaluated, so that coalitions cost at most as many passes as there are rows.

    Attributes:
        rows: [n, ...] what can be; also a data set, whose rows stand for the distribution.
        weight: [n], their probabilities; equal unless given.

    Raises:
        ConfigError: weights that are no tensor, negative, or not one per row.
        InputError: no rows; an example of which no row has what is kept, or soft masks.

    >>> import apportion as ap
    >>> table = Conditional(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.5, 0.25, 0.25]))
    >>> q = ap.Field(lambda x: x[:, 1]).bind(torch.tensor([[1.0, 1.0]]))
    >>> ap.Game(q, ap.groups.Elements(), table).value(torch.tensor([[0, 0], [1, 0], [1, 1]]).bool())
    tensor([[0.2500, 0.5000, 1.0000]])
    """

    may_repeat: ClassVar[bool] = True

    rows: Tree
    weight: Float[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, w = tree.leaves(self.rows), self.weight
        for row in rows:
            if not isinstance(row, Tensor) or not row.ndim or not len(row):
                shape = f"shape {tuple(row.shape)}" if isinstance(row, Tensor) else kind_of(row)
                raise InputError(
                    f"rows of {shape} as a table", "a tensor [n, ...], n from 1", "give what can be, row by row"
                )
        if w is not None and not isinstance(w, Tensor):
            raise ConfigError(f"{kind_of(w)} as weights", "a tensor, one for each row", "convert with torch.as_tensor")
        if w is not None and (w.is_complex() or not bool(torch.isfinite(w).all())):
            raise ConfigError(f"weights of {w.dtype} that are complex or not finite", "finite numbers", "repair them")
        if w is not None and (w.shape != (tree.rows(self.rows),) or not bool((w >= 0).all()) or not bool(w.any())):
            raise ConfigError(
                f"weights of shape {tuple(w.shape)}, from {float(w.min()):.3g}, for {tree.rows(self.rows)} rows",
                "one for each row, from 0, not all 0",
                "give the probabilities of the rows",
            )

    @property
    def draws(self) -> int:
        return tree.rows(self.rows)

    @property
    def exact(self) -> bool:
        return False

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Weighted:
        rows = like_input(q, self.rows, "rows of the table")
        agree = torch.ones(len(owner), self.draws, dtype=torch.bool, device=owner.device)
        for x, kept, row in zip(*(tree.leaves(t) for t in (q.x, hard(mask, "Conditional"), rows)), strict=True):
            same = (x[owner][:, None] == row[None]) | ~kept[:, None]
            agree &= same.flatten(2).all(2)
        first = tree.leaves(rows)[0]
        p = torch.ones(self.draws, dtype=torch.float64) if self.weight is None else self.weight
        weight = agree * p.to(first)
        total = weight.sum(1, keepdim=True)
        if bool((total == 0).any()):
            example = int(owner[int((total[:, 0] == 0).nonzero()[0])])
            raise InputError(
                f"example {example}, of which no row of the table has all that some coalition keeps",
                "examples that can be, by the table",
                "give a table with their rows, or another fill",
            )
        return Weighted(tree.apply(lambda r: r.expand(len(owner), *r.shape), rows), weight / total)
