"""Traces: paths whose points are decided step by step, each by what the model says at the last one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import ConfigError
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.paths.path import Legs, Path

_MEMORY = 1 << 30
"""Bytes of points and gradients kept at a time, for paths that are found from their end."""


@dataclass(frozen=True)
class Trace(Path):
    """Base of the traces.

    Branches are walked in groups of as many rows as fit a pass; within a group every step is one pass over
    those that are not there yet.
    """

    @property
    @abstractmethod
    def most(self) -> int:
        """The most steps a branch takes."""


def groups(q: Question, branches: int, kept: int = 0) -> Iterator[tuple[Int[Tensor, " R"], Int[Tensor, " R"]]]:
    """Go over all branches of all examples in groups.

    Args:
        q: the question.
        branches: per example.
        kept: steps of which point and gradient are kept until the group is through.

    Yields:
        The example and the branch of each row of a group.
    """
    size = sum(leaf[0].numel() * leaf.element_size() for leaf in tree.leaves(q.x))
    fit = max(1, _MEMORY // max(1, 2 * size * kept)) if kept else q.field.chunk
    count, first = len(q) * branches, 0
    while first < count:
        rows = torch.arange(first, min(first + min(fit, q.field.chunk), count), device=q.device)
        first += len(rows)
        yield rows // branches, rows % branches


def flat(points: Tree) -> Float[Tensor, "R d"]:
    """Lay all elements of each row side by side.

    >>> flat((torch.ones(2, 3), torch.zeros(2)))
    tensor([[1., 1., 1., 0.],
            [1., 1., 1., 0.]])
    """
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree.leaves(points)], 1)


def shaped(rows: Float[Tensor, "R d"], like: Tree) -> Tree:
    """Undo `flat`.

    >>> shaped(torch.arange(4.0)[None], (torch.ones(2, 3), torch.zeros(2)))
    (tensor([[0., 1., 2.]]), tensor([3.]))
    """
    leaves = tree.leaves(like)
    parts = rows.split([leaf[:1].numel() for leaf in leaves], 1)
    flat_leaves = [p.reshape(len(rows), *leaf.shape[1:]).to(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
    return tree.rebuild(like, flat_leaves)


def unmoved(before: Tree, after: Tree) -> Bool[Tensor, " R"]:
    """Tell which rows are the same in both."""
    pairs = zip(tree.leaves(before), tree.leaves(after), strict=True)
    return torch.stack([(a == b).reshape(len(a), -1).all(1) for a, b in pairs]).all(0)


class Record:
    """The steps of a group of branches, kept until their direction of travel is known to the end."""

    def __init__(self, owner: Tensor, branch: Tensor) -> None:
        self.owner, self.branch = owner, branch
        self._steps: list[tuple[Tensor, Tree, Tensor, Tree]] = []

    def add(self, rows: Int[Tensor, " A"], point: Tree, value: Float[Tensor, " A"], grad: Tree) -> None:
        """Add one step of some rows; rows that miss a step take none later."""
        if len(rows):
            self._steps.append((rows, point, value, grad))

    @property
    def counts(self) -> Int[Tensor, " R"]:
        """How many steps each row took."""
        taken = torch.zeros(len(self.owner), dtype=torch.long, device=self.owner.device)
        for rows, *_ in self._steps:
            taken[rows] += 1
        return taken

    def legs(
        self, end: Tree, end_value: Float[Tensor, " R"], *, back: bool, rises: bool, origin: Tree = None
    ) -> Iterator[Legs]:
        """Give the steps as legs, in order of the path.

        Args:
            end: where each row's last step led.
            end_value: the score there.
            back: the steps went from the example towards the start, so the path runs against them.
            rises: give each leg its rise.
            origin: the point all moves are measured from, in place of the step's own point.
        """
        count, sign = self.counts.clamp(min=1).double(), 1 if back else -1
        for i in reversed(range(len(self._steps))) if back else range(len(self._steps)):
            rows, point, value, grad = self._steps[i]
            after, after_value = self._after(i, end, end_value)
            base = point if origin is None else tree.index(origin, rows)
            move = tree.apply(lambda p, a: sign * (p - a), base, after)
            rise = sign * (value - after_value) if rises else None
            t = 1 - i / count[rows] if back else i / count[rows]
            yield Legs(self.owner[rows], self.branch[rows], t, point, value, grad, move, rise)

    def _after(self, i: int, end: Tree, end_value: Tensor) -> tuple[Tree, Tensor]:
        """Give where step i led: the next step's point, or the end for rows without one."""
        rows = self._steps[i][0]
        after, after_value = tree.index(end, rows), end_value[rows]
        if i + 1 < len(self._steps):
            on, point, value, _ = self._steps[i + 1]
            at = torch.searchsorted(rows, on)  # rows stay in ascending order
            after = tree.apply(lambda a, p: a.index_copy(0, at, p), after, point)
            after_value = after_value.index_copy(0, at, value)
        return after, after_value


class Ends:
    """The starting points that a trace finds at its far end, scored once all are there."""

    def __init__(self, q: Question, branches: int, name: str) -> None:
        self.q, self.k, self.name = q, branches, name
        rows = len(q) * branches
        self.points = tree.apply(lambda x: x.new_zeros(rows, *x.shape[1:]), q.x)
        self._missing = rows
        self._made: References | None = None

    def put(self, owner: Tensor, branch: Tensor, points: Tree) -> None:
        """Keep where a group's branches ended."""
        at = owner * self.k + branch
        tree.apply(lambda into, p: into.index_copy_(0, at, p), self.points, points)
        self._missing -= len(at)

    def references(self) -> References:
        """Give them.

        Raises:
            ConfigError: asked before the path was walked.
        """
        if self._missing:
            raise ConfigError(
                f"the starting points of {self.name} asked before its legs were read",
                "an accumulator that reads the legs first",
                "use another path, such as Straight, for this accumulator",
            )
        if self._made is None:
            self._made = self.q.references_at(tree.apply(lambda t: t.unflatten(0, (-1, self.k)), self.points))
        return self._made
