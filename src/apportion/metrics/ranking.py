"""Rankings: a map as one number for each player, and players in order; ties are drawn, never left to the layout."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.game import labels_of
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.statistics import argsort
from apportion.parts.masks.groups import Cells, Elements, Pixels


def players(q: Question, groups: Groups | None) -> Groups:
    """Choose the players that a map ranks: what is given, or pixels of pictures and volumes, or else elements."""
    if groups is not None:
        return groups
    return Pixels() if all(x.ndim > 3 for x in tree.leaves(q.x)) else Elements()


def cells(q: Question, groups: Groups | None) -> Groups:
    """Choose the cells that are deleted: what is given, or 4 × 4 of pictures, or else as `players`."""
    pictures = groups is None and isinstance(q.x, Tensor) and q.x.ndim == 4
    return Cells(4) if pictures else players(q, groups)


def by_player(q: Question, values: Tree, groups: Groups) -> Float[Tensor, "B P"]:
    """Sum a map over each player's elements.

    Args:
        q: the examples.
        values: a map, shaped as the input; or with one channel, which is what all channels have together.
        groups: the players, as of the input.

    Returns:
        One number a player; elements of no player (-1) do not count.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum((1, 2, 3))).bind(torch.zeros(1, 3, 1, 2))
    >>> by_player(q, torch.tensor([[[[1.0, 2.0]]]]), ap.groups.Pixels())
    tensor([[1., 2.]])
    """
    batch = len(q)
    labels = tree.leaves(labels_of(groups, q))
    players = 1 + max(int(one.max()) for one in labels)
    sums: Tensor | None = None
    for v, x, label in zip(tree.leaves(values), tree.leaves(q.x), labels, strict=True):
        if v.shape != x.shape and bool((label == label[:, :1]).all()):
            label = label[:, :1]  # one channel for all
        elif v.shape != x.shape:
            v = v.expand_as(x) / x.shape[1]
        flat = label.to(v.device).expand(batch, *label.shape[1:]).expand(v.shape).flatten(1)
        part = v.new_zeros(batch, players + 1).scatter_add_(1, flat.masked_fill(flat < 0, players), v.flatten(1))
        sums = part if sums is None else sums + part
    assert sums is not None  # a tree has a leaf
    return sums[:, :players]


def order(q: Question, scores: Float[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """Put players in order, the highest score first; players with equal scores in an order drawn for the example.

    Left to the layout of memory, ties would be broken from the top left, which is a ranking of its own: a map of zeros
    would be one that begins with the sky.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1)).bind(torch.zeros(1, 3))
    >>> order(q, torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[1, 2, 0]])
    """
    first = argsort(-scores)
    ordered = scores.gather(1, first)
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero()[:, 0]
    if len(tied):
        owner, some = tied.cpu(), scores[tied]
        drawn = q.stream("ties").uniform(torch.zeros_like(some, device="cpu", dtype=torch.float32), owner, 0 * owner)
        by_chance = drawn.argsort(1).to(scores.device)
        first[tied] = by_chance.gather(1, some.gather(1, by_chance).argsort(dim=1, descending=True, stable=True))
    return first


def ties(scores: Float[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """Give the share of players whose score another one has too: 1 for a constant map, whose ranking says nothing."""
    ordered = scores.gather(1, argsort(scores))
    same = ordered[:, 1:] == ordered[:, :-1]
    edge = torch.zeros_like(same[:, :1])
    return (torch.cat([edge, same], 1) | torch.cat([same, edge], 1)).double().mean(1)
