"""Random subsets of players: what a map says of each, beside what removing it does to the score."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.metric import key_of
from apportion.metrics.ranking import by_player, players
from apportion.metrics.statistics import Correlation, is_constant
from apportion.parts.masks.fill import Fill

_AT_ONCE = 1 << 22
"""Entries of masks held at once."""
_IN_CACHE = 1 << 16
"""Numbers that are partitioned at once."""


def game(q: Question, groups: Groups | None, fill: Fill) -> Game:
    """Set up the game in which subsets are removed."""
    return Game(q, players(q, groups), fill)


def sizes(among: Int[Tensor, " B"], fractions: tuple[float, ...]) -> tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Turn fractions of the players into numbers of players, at least one and never all.

    Args:
        among: players of each example.
        fractions: in ascending order.

    Returns:
        The numbers, and where a number comes for the first time: small pictures have several fractions of one size.

    >>> sizes(torch.tensor([10]), (0.01, 0.1, 0.5, 1.0))
    (tensor([[1, 1, 5, 9]]), tensor([[ True, False,  True,  True]]))
    """
    n = (among[:, None] * torch.tensor(fractions, dtype=torch.float64)).round().long()
    n = torch.minimum(n.clamp(min=1), (among[:, None] - 1).clamp(min=1))
    return n, torch.cat([torch.ones_like(n[:, :1], dtype=torch.bool), n[:, 1:] != n[:, :-1]], 1)


def subsets(
    q: Question, own: Bool[Tensor, "B P"], n: Int[Tensor, "B K"], samples: int
) -> Iterator[tuple[Int[Tensor, " s"], Bool[Tensor, "B s P"]]]:
    """Draw subsets of each size for each example, a pass at a time: which of the K·samples, and who is in them."""
    batch, count = own.shape
    step = max(1, min(_AT_ONCE // count, q.field.chunk) // batch)
    stream = q.stream("subsets")
    for start in range(0, n.shape[1] * samples, step):
        at = torch.arange(start, min(start + step, n.shape[1] * samples))
        owner = torch.arange(batch).repeat_interleave(len(at))
        key = stream.places(owner, at.repeat(batch), count)
        if not bool(own.all()):
            key = key.masked_fill(~own[owner], 1 << 23)
        yield at, lowest(key, n[:, at // samples].flatten()).reshape(batch, len(at), count)


def lowest(key: Int[Tensor, "R P"], n: Int[Tensor, " R"]) -> Bool[Tensor, "R P"]:
    """Mark the n lowest numbers of each row, n differing from row to row: by selection, which is faster than sorting.

    >>> lowest(torch.tensor([[3, 1, 1, 2]]), torch.tensor([2])).tolist()
    [[False, True, True, False]]
    """
    numbers, sizes = key.numpy(), n.numpy()
    out, most = np.empty(numbers.shape, dtype=bool), np.iinfo(numbers.dtype).max
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        for block in np.array_split(rows, -(-rows.size * numbers.shape[1] // _IN_CACHE)):
            here = numbers[block]
            parted = here.copy()
            parted.partition(size - 1, axis=1)
            limit = parted[:, size - 1 : size]
            mine = here <= limit
            many = np.flatnonzero(parted[:, size:].min(axis=1, initial=most) == limit[:, 0])
            if many.size:  # of equal numbers at the limit, the first ones
                mine[many] = here[many].argsort(axis=1, kind="stable").argsort(axis=1) < size
            out[block] = mine
    return torch.from_numpy(out)


def correlated(
    q: Question,
    play: Game,
    values: Tree,
    n: Int[Tensor, "B K"],
    first: Bool[Tensor, "B K"],
    samples: int,
    by: Correlation,
) -> tuple[Float[Tensor, "B K"], dict[str, Bool[Tensor, " B"]]]:
    """Correlate, within each example and over random subsets of each size, a map's sums with the score's fall.

    Args:
        q: the examples.
        play: what removes players.
        values: the map.
        n: sizes.
        first: which of them are to be measured; the others have the correlation of the one before.
        samples: subsets of each size.
        by: correlates.

    Returns:
        The correlations, and why examples have none at all.
    """
    assert isinstance(play.groups, Groups)  # windows have no labels to sum a map by
    phi = tree.wide(by_player(q, values, play.groups)).cpu()
    asked = first.repeat_interleave(samples, 1)
    told: list[Tensor] = []

    def claim(removed: Tensor) -> Tensor:
        return (removed.to(phi.dtype) @ phi[:, :, None])[..., 0]

    def left(_: Question) -> Tensor:
        """Score what is left, and sum the map on the way, as the subsets are at hand."""
        scores = []
        for at, removed in subsets(q, play.own, n, samples):
            told.append(claim(removed))
            scores.append(play.value(~removed, asked[:, at]).detach())
        return torch.cat(scores, 1).cpu()

    key = ("scores without subsets", key_of(play.groups), key_of(play.fill), samples, tuple(map(tuple, n.tolist())))
    score = q.once(key, left).unflatten(1, (-1, samples))
    if not told:  # the scores are there, by another map
        told = [claim(removed) for _, removed in subsets(q, play.own, n, samples)]
    claimed = torch.cat(told, 1).unflatten(1, (-1, samples))
    # f(x) - f(x without S) and -f(x without S) correlate alike; whether the score moved at all shows in the latter
    found = by(claimed, -score).masked_fill(~first, torch.nan)
    none = found.isnan().all(1)
    silent = (is_constant(claimed) | ~first).all(1)
    why = {
        "the map gives every subset the same sum": none & silent,
        "removing any of the subsets changes the score alike": none & ~silent,
    }
    same = (torch.arange(n.shape[1]) * first).cummax(1).values
    return found.gather(1, same).to(q.device), {k: v.to(q.device) for k, v in why.items()}
