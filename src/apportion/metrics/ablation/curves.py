"""Curves: the score while players are removed in the order of a map; each point is evaluated once for all metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.config import Json
from apportion.core.errors import ConfigError, kind_of
from apportion.core.explainer import Passes
from apportion.core.game import Game
from apportion.core.progress import tick
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.score import Probability, Score
from apportion.core.tree import Tree
from apportion.metrics.metric import Metric, Subject, key_of
from apportion.metrics.ranking import by_player, order, ties
from apportion.metrics.scores import Curve
from apportion.parts.baselines import NetworkZero
from apportion.parts.masks.fills import Baselines, Fill

Counts = Int[Tensor, "B K"]
"""For each example, how many players are gone at each point of its curve."""

_AT_ONCE = {"cpu": 1 << 20}
"""Elements of rows made at once, by device: what stays in a processor's cache."""
_AT_ONCE_ELSEWHERE = 1 << 24


def sizes(q: Question, groups: Groups) -> Int[Tensor, " B"]:
    """Count the players of each example."""
    most = [label.cpu().flatten(1).amax(1) for label in tree.leaves(groups.labels(q.x))]
    return 1 + torch.stack([m.expand(len(q)) for m in most]).amax(0)


def seen(
    game: Game, score: Score, owner: Owner, draw: Int[Tensor, " R"], keep: Callable[[slice], Bool[Tensor, "r P"]]
) -> Float[Tensor, " R"]:
    """Score rows of which some players are kept, made a block at a time: memory does not grow with their number.

    Args:
        game: the players, and what stands where they are absent.
        score: what is read off the outputs.
        owner: the example each row belongs to.
        draw: a number for the fill's random streams.
        keep: gives the players kept in some of the rows.
    """
    q, out, start = game.question, [], 0
    draws = int(getattr(game.fill, "draws", 1))
    elements = sum(leaf[0].numel() for leaf in tree.leaves(q.x)) * draws
    size = max(1, min(q.field.chunk // draws, _AT_ONCE.get(q.device.type, _AT_ONCE_ELSEWHERE) // elements))
    while start < len(owner):
        at = slice(start, start + size)
        element = game.elements(keep(at), owner[at])
        out.append(game.seen(element, owner[at], draw[at], score))
        start = min(at.stop, len(owner))
        tick("points of curves", start, len(owner))
    return torch.cat(out) if out else torch.zeros(0, device=q.device)


class Removals:
    """The score of each example with so many of its players removed, from either end of its ranking.

    Attributes:
        question: the examples.
        sizes: how many players each has.
        ties: for each, the share of players whose value another one has too.
    """

    def __init__(self, q: Question, values: Tree, groups: Groups, fill: Fill, score: Score) -> None:
        """Rank the players of a map.

        Args:
            q: the examples.
            values: the map.
            groups: the players.
            fill: what stands where they are gone.
            score: what is read off the outputs.
        """
        self.question, self.score = q, score
        self.game = Game(q, groups, fill)
        self.sizes = sizes(q, groups)
        ranked = by_player(q, values, groups)
        own = self.game.own.to(ranked.device)
        first = order(q, ranked.masked_fill(~own, -torch.inf))  # absent players come last
        places = torch.arange(first.shape[1], dtype=torch.int32, device=first.device).expand_as(first)
        self.rank = torch.empty_like(first, dtype=torch.int32).scatter_(1, first, places)
        each = zip(ranked, self.sizes.tolist(), strict=True)
        self.ties = torch.cat([ties(r[None, :n]) for r, n in each]) if self.game.is_ragged else ties(ranked)
        self._has = torch.zeros(2, len(q), self.game.players + 1, dtype=torch.bool)
        self._known: Tensor | None = None
        if bool((self.sizes < 2).any()):
            q.warn("a single player: there is nothing to rank, and every map gets the same curve")
        if bool((self.ties > 0.5).any()):
            q.warn(
                "more than half of the players of an example have the value of another one; they are ranked at random: "
                "see parts['ties']"
            )

    def __call__(self, gone: Counts, lowest: bool = False) -> Float[Tensor, "B K"]:
        """Give the score where some players are gone, evaluating what was not asked before.

        Args:
            gone: how many.
            lowest: those of the lowest values; of the highest unless told.
        """
        side = int(lowest)
        wanted = torch.zeros_like(self._has[0]).scatter_(1, gone, True) & ~self._has[side]
        untouched = wanted[:, 0].nonzero()[:, 0].to(self.question.device)
        if len(untouched):
            points = tree.index(self.question.x, untouched)
            self._keep(self.question.value(points, untouched, self.score), untouched.cpu(), 0 * untouched.cpu(), side)
        wanted[:, 0] = False
        owner, count = wanted.nonzero(as_tuple=True)
        if len(owner):
            self._keep(self._removed(owner, count, lowest), owner, count, side)
        assert self._known is not None  # a curve has a point
        return self._known[side].gather(1, gone.to(self._known.device))

    def share(self, gone: Counts, like: Tensor) -> Float[Tensor, "B K"]:
        """Give counts as shares of each example's players, where other numbers are."""
        return tree.wide(gone.to(like.device)) / self.sizes[:, None].to(like.device)

    def _removed(self, owner: Tensor, count: Tensor, lowest: bool) -> Tensor:
        full = self.sizes[owner]
        draw = torch.where(count == full, full, count + lowest * (1 + full))  # all of them is one coalition
        of, edge = owner.to(self.rank.device), (full - count if lowest else count).int().to(self.rank.device)

        def keep(at: slice) -> Tensor:
            rank = tree.of_owners(self.rank, of[at])
            return rank < edge[at, None] if lowest else rank >= edge[at, None]

        return seen(self.game, self.score, of, draw, keep)

    def _keep(self, found: Tensor, owner: Tensor, count: Tensor, side: int) -> None:
        """Remember points; where none or all are gone, it does not matter which went first."""
        if self._known is None:
            self._known = found.new_full(self._has.shape, torch.nan)
        self._has[side, owner, count] = True
        self._known[side, owner.to(found.device), count.to(found.device)] = found.detach()
        every = torch.arange(len(self.sizes))
        for end in (0 * self.sizes, self.sizes):
            known = self._has[side, every, end]
            of, at = every[known], end[known]
            self._has[1 - side, of, at] = True
            self._known[1 - side, of, at] = self._known[side, of, at]


def removals(q: Question, subject: Subject, groups: Groups, fill: Fill, score: Score) -> Removals:
    """Give what all metrics of one subject with these settings share."""
    key = ("removals", *(key_of(part) for part in (groups, fill, score)))
    return subject.share(key, lambda: Removals(q, subject.map(q), groups, fill, score))


@dataclass(frozen=True)
class Removing(Metric):
    """Base of the metrics that remove players in the order of a map.

    Attributes:
        groups: the players, ranked by the sum of their signed values.
        fill: what stands where they are gone.
        score: what is watched; it shares the question's target. A model of one number has its sigmoid for probability.
    """

    groups: Groups | None = None
    fill: Fill = Baselines(NetworkZero())
    score: Score = Probability()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.groups
        if given is not None and (isinstance(given, type) or not isinstance(given, Groups)):
            raise ConfigError(
                f"{kind_of(given)} as groups of {type(self).__name__}",
                "an instance of groups that do not overlap, so that each has one value",
                "write groups=ap.groups.Squares(8), or another partition",
            )

    def removals(self, q: Question, subject: Subject) -> Removals:
        """Give the points of the curves."""
        return removals(q, subject, self.players(q), self.fill, self.score)

    def asked(self, q: Question) -> Iterable[tuple[Counts, bool]]:
        """Name the points that are needed: how many players are gone, and whether from the lowest."""
        return [self.counts(q)]

    @abstractmethod
    def counts(self, q: Question) -> tuple[Counts, bool]:
        """Lay out the points of a curve, and say whether the lowest go first."""

    def passes(self, q: Question) -> Passes:
        """Count the points, each once."""
        return together(q, [self])


def together(q: Question, metrics: Iterable[Removing]) -> Passes:
    """Count the points of several metrics of one subject; those of the same settings share them.

    Where none or all players are gone, it does not matter which went first.
    """
    alike: dict[Hashable, list[Removing]] = {}
    for m in metrics:
        alike.setdefault(tuple(key_of(part) for part in (m.players(q), m.fill, m.score)), []).append(m)
    total, every, exact = torch.zeros(len(q), dtype=torch.long), torch.arange(len(q)), True
    once = Passes(0, 0)
    for group in alike.values():
        fill, count = group[0].fill, sizes(q, group[0].players(q))
        has = torch.zeros(2, len(q), 1 + int(count.max()), dtype=torch.bool)
        for gone, lowest in (asked for m in group for asked in m.asked(q)):
            has[int(lowest)].scatter_(1, gone, True)
        total += has[:, :, 0].any(0).long() + fill.draws * has[:, every, count].any(0)
        has[:, every, 0] = has[:, every, count] = False
        total += fill.draws * has.sum((0, 2))
        exact = exact and fill.exact
        once = fill.base.added_to(once, scored=False) if isinstance(fill, Baselines) else once
    return once._replace(forward=int(total.max()), exact=once.exact and exact and bool((total == total[0]).all()))


@dataclass(frozen=True)
class Stepwise(Removing):
    """Base of those that remove some players at a time.

    Attributes:
        step: how many go at a time.
        limit: how many go at all; every player unless given, as fills that need something left cannot stand.
    """

    step: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step", "limit"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ConfigError(f"{type(self).__name__}({name}={given})", "1 or more", f"leave {name} out for all")

    def ends(self, q: Question) -> Int[Tensor, " B"]:
        """Count the players that go in the end."""
        count = sizes(q, self.players(q))
        return count if self.limit is None else count.clamp(max=self.limit)

    def stride(self, q: Question) -> int:
        """Choose how many players go at a time: so many that there are as many steps as a picture has rows."""
        if self.step is not None:
            return self.step
        rows = [x.shape[-2] for x in tree.leaves(q.x) if x.ndim > 3]
        return max(1, -(-int(sizes(q, self.players(q)).max()) // max(rows))) if rows else 1

    def resolved(self, q: Question) -> dict[str, Json]:
        return super().resolved(q) | ({"step": self.stride(q)} if self.step is None else {})

    def until(self, q: Question) -> Counts:
        """Count up by steps, both ends included; the last step may be shorter, and shorter examples stay at their end.

        Example: 0, 3, 6, 7 for seven players, three at a time.
        """
        ends, stride = self.ends(q), self.stride(q)
        steps = -(-int(ends.max()) // stride)
        return torch.minimum(stride * torch.arange(steps + 1), ends[:, None])


def area(x: Float[Tensor, "B K"], y: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Integrate by trapezoids, over the range of x: the mean height, in units of y.

    >>> area(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    tensor([0.7500], dtype=torch.float64)
    """
    x, y = tree.wide(x), tree.wide(y)
    return (x.diff(dim=1) * (y[:, 1:] + y[:, :-1]) / 2).sum(1) / (x[:, -1] - x[:, 0])


def new(gone: Counts, like: Tensor) -> Bool[Tensor, "B K"]:
    """Tell the points of each example from repetitions of its last one, which stand for those it does not have."""
    return torch.cat([torch.ones_like(gone[:, :1], dtype=torch.bool), gone.diff(dim=1) != 0], 1).to(like.device)


def height(gone: Counts, y: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Average the points of each example, the first included, each once."""
    once = new(gone, y)
    return (tree.wide(y) * once).sum(1) / once.sum(1)


def drawn(share: Float[Tensor, "B K"], y: Float[Tensor, "B K"], what: str, score: Score) -> Curve:
    """Make a curve, on one axis for all where they have the same."""
    x = share[0] if bool((share == share[:1]).all()) else share
    return Curve(x, y, what, type(score).__name__)
