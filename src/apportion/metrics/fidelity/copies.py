"""Noisy copies of each example, explained a block at a time; distances between maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Domain
from apportion.core.external import fitted
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.metric import Subject
from apportion.parts.noise import NoiseModel

PURPOSE = "copies"
"""Of the random stream, which no method uses for noise of its own."""


def explained(subject: Subject, q: Question) -> Tree:
    """Ask the explainer about other rows: a map of each, shaped as those of the examples."""
    a = subject.explainer.explain(q)
    if a.domain is Domain.GROUPS and a.groups is not None:
        a = a.spread()
    return tree.apply(lambda v, x: fitted(v, x, subject.name), a.values, q.x)


def copies(
    q: Question, subject: Subject, noise: NoiseModel, samples: int
) -> Iterator[tuple[Tree, Owner, Int[Tensor, " R"], Tree]]:
    """Make noisy copies of all examples and explain them: rows, their owners, their numbers, and their maps.

    Blocks go over copies and examples alike, so that they are as large as one pass takes, and memory does not grow
    with the number of copies.
    """
    for draw, owner in q.grid(samples, "noisy copies"):
        rows = noise(q, owner, draw, PURPOSE)
        yield rows, owner, draw, explained(subject, q.at(rows, owner, draw))


def minus(rows: Tree, examples: Tree, owner: Owner) -> Tree:
    """Take from each row what its owner has."""
    return tree.apply(lambda a, b: a - b[owner], rows, examples)


def norm(rows: Tree) -> Float[Tensor, " R"]:
    """Give each row's Euclidean norm, over all its leaves."""
    flat = [t.reshape(len(t), -1) for t in tree.leaves(rows)]
    return torch.stack([torch.linalg.vector_norm(t, dim=1, dtype=tree.wide(t[:0]).dtype) for t in flat]).norm(dim=0)


def by_example(parts: list[Float[Tensor, " R"]], batch: int) -> Float[Tensor, "B N"]:
    """Lay out numbers met by `Question.grid`, one row an example."""
    return torch.cat(parts).reshape(-1, batch).T
