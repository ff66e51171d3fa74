"""Noisy copies of each example, explained a block at a time; distances between maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Domain
from apportion.core.external import fitted
from apportion.core.field import Field
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.metric import Subject, as_asked
from apportion.parts.noise import NoiseModel

PURPOSE = "copies"
"""Of the random stream, which no method uses for noise of its own."""


def asked(subject: Subject, q: Question) -> Tree:
    """Ask the explainer about other rows: a map of each, where its elements are."""
    a = subject.explainer.explain(q)
    return a.spread(share=True).values if a.domain is Domain.GROUPS and a.groups is not None else a.values


def explained(subject: Subject, q: Question) -> Tree:
    """Ask about other rows, for maps shaped as those of the examples."""
    return tree.apply(lambda v, x: fitted(v, x, subject.name), asked(subject, q), q.x)


def at_examples(subject: Subject, q: Question) -> Tree:
    """Ask about the examples themselves, on the account of the question."""
    return asked(subject, q.at(q.x, q.owners, torch.zeros_like(q.owners)))


def of_model(subject: Subject, q: Question, model: Any) -> Tree:
    """Ask about the same examples and classes of another model, on the same account."""
    other = bound(q.field.with_model(model), q)
    values = at_examples(subject, other)
    q.charge(other.account)
    return values


def bound(field: Field, q: Question) -> Question:
    """Ask another field about the same examples and classes."""
    return field.bind(q.inputs, as_asked(q.target), q.ids, q.seed)


def copies(
    q: Question, subject: Subject, noise: NoiseModel, samples: int
) -> Iterator[tuple[Tree, Owner, Int[Tensor, " R"], Tree]]:
    """Make noisy copies of all examples and explain them: rows, their owners, their numbers, and their maps.

    Blocks go over copies and examples alike, so that they are as large as one pass takes, and memory does not grow
    with the number of copies.
    """
    for draw, owner in q.grid(samples, "noisy copies"):
        rows = noise(q, owner, draw, PURPOSE)
        yield rows, owner, draw, explained(subject, q.anew(rows, owner, draw))


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
