"""Samplers: which coalitions are asked."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError
from apportion.core.game import Block, Game
from apportion.core.protocols import Owner
from apportion.core.streams import Stream
from apportion.parts.masks.looks import looks


@dataclass(frozen=True)
class Sampler(Configurable):
    """Base of the samplers: coalitions in blocks, each made when it is needed.

    Random ones are drawn by each example's own stream, and prefixes of it: a larger budget begins with the
    coalitions of a smaller one, and the batch changes nothing. Those that do not begin so say it in `begins_alike`.
    """

    begins_alike: ClassVar[bool] = True
    """Whether a larger budget begins with the coalitions of a smaller one, weighed alike."""

    @abstractmethod
    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        """Give the coalitions.

        Args:
            game: whose players they are of.
            budget: how many may be evaluated for each example, not counting the empty and the full one.
            purpose: names the random stream: another gives an independent sample.
        """

    @abstractmethod
    def coalitions(self, players: int, budget: int | None = None) -> int:
        """Count what is evaluated for an example of so many players, without the empty and the full one, at most."""

    def repeats(self, players: int, budget: int | None = None) -> bool:
        """Tell whether the coalitions are the same whatever the purpose, so that nothing is left to chance."""
        return False


def needed(budget: int | None, least: int, what: str) -> int:
    """Give a budget that is large enough.

    Args:
        budget: the number of coalitions.
        least: the fewest that will do.
        what: for whom, in messages.

    Raises:
        ConfigError: none, or too few.
    """
    if budget is None or budget < least:
        raise ConfigError(f"budget={budget} for {what}", f"at least {least} coalitions", f"give budget={least} or more")
    return budget


def _bits(at: Tensor, players: int) -> Tensor:
    return (at[:, None] >> torch.arange(players)) & 1 == 1


@dataclass(frozen=True)
class AllSubsets(Sampler):
    """Every coalition; number s holds player i where bit i of s is 1.

    Attributes:
        most: the largest number of players: 2^most coalitions are evaluated.

    >>> import apportion as ap
    >>> game = ap.Game(ap.Field(lambda x: x.prod(1)).bind(torch.ones(1, 2)), ap.groups.Elements(), ap.fills.Baselines())
    >>> next(AllSubsets().blocks(game)).masks.int().tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """

    _positive = ("most",)

    most: int = 20

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        n = game.players
        if n > self.most:
            raise InputError(
                f"all subsets of {n} players, which are 2^{n}",
                f"at most {self.most} players",
                "make fewer players with ap.groups.Squares, Superpixels or Labels, or sample coalitions",
            )
        step = 1 << 14
        for start in range(0, 1 << n, step):
            size = min(step, (1 << n) - start)
            where = None
            if game.is_ragged:
                where = torch.arange(start, start + size) < (1 << game.sizes)[:, None]
            yield Block(size, lambda at, start=start: _bits(start + at, n), where)

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return max(0, 2**players - 2)

    def repeats(self, players: int, budget: int | None = None) -> bool:
        return True


@dataclass(frozen=True)
class LeaveOneOut(Sampler):
    """All players but one, each in turn; or one alone.

    Attributes:
        alone: keep one player and remove the others.
    """

    alone: bool = False

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        n = game.players

        def make(at: Tensor) -> Tensor:
            return (at[:, None] == torch.arange(n)) == self.alone

        yield Block(n, make, game.own if game.is_ragged else None)

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return players if players > 1 else 0

    def repeats(self, players: int, budget: int | None = None) -> bool:
        return True


@dataclass(frozen=True)
class Pairs(Sampler):
    """All players but two, for each pair; or two alone. `Pairs.of(n)` tells which.

    Attributes:
        alone: keep the pair and remove the others.

    >>> Pairs.of(3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    """

    alone: bool = False

    @staticmethod
    def of(players: int) -> Int[Tensor, "pairs 2"]:
        """List the pairs, in the order of the coalitions."""
        return torch.triu_indices(players, players, 1).T

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        pairs, n = self.of(game.players), game.players

        def make(at: Tensor) -> Tensor:
            return (pairs[at][..., None] == torch.arange(n)).any(1) == self.alone

        where = (pairs[:, 1] < game.sizes[:, None]) if game.is_ragged else None
        if len(pairs):
            yield Block(len(pairs), make, where)

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return math.comb(players, 2) if players > 2 else 0

    def repeats(self, players: int, budget: int | None = None) -> bool:
        return True


def _uniform(game: Game, purpose: str, draws: Tensor, count: int) -> Float[Tensor, "B m c"]:
    """Draw [B, m, count] numbers for draws [m] or [B, m]; the first of a draw do not depend on how many there are."""
    batch, m = len(game.question), draws.shape[-1]
    owner = torch.arange(batch).repeat_interleave(m)
    stream = game.question.stream(purpose)
    return stream.uniform(torch.zeros(1, count), owner, draws.expand(batch, m).flatten()).reshape(batch, m, count)


def _ranks(keys: Tensor) -> Int[Tensor, "B m P"]:
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1)


@dataclass(frozen=True)
class Permutations(Sampler):
    """Orders of the players, uniform; each gives the coalitions of its first 0, 1, ..., P players.

    A block of m orders has m (P + 1) coalitions, order by order. An order of n players costs n - 1 coalitions,
    since the empty and the full one are known.

    Attributes:
        antithetic: follow each order by its reverse.
        rotated: follow each by all its rotations, so that every player comes once at every place (strata).

    >>> import apportion as ap
    >>> game = ap.Game(ap.Field(lambda x: x.prod(1)).bind(torch.ones(1, 3)), ap.groups.Elements(), ap.fills.Baselines())
    >>> block = next(Permutations().blocks(game, budget=2))
    >>> block.order.shape, block.masks.sum(-1).tolist()
    (torch.Size([1, 1, 3]), [[0, 1, 2, 3]])
    """

    antithetic: bool = False
    rotated: bool = False

    def family(self, players: int) -> int:
        """Count the orders made of each one drawn, itself included; those of different ones are independent."""
        return (players if self.rotated else 1) * (2 if self.antithetic else 1)

    def orders(self, players: int, budget: int | None) -> int:
        """Count the orders that a budget pays for, of so many players.

        Raises:
            ConfigError: none.
        """
        players = max(1, players)
        family, cost = self.family(players), max(1, players - 1)
        what = f"permutations of {players} player(s), {family} at a time"
        return family * (needed(budget, family * cost, what) // (family * cost))

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return self.orders(players, budget) * max(0, players - 1)

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        n, sizes = game.players, game.sizes
        most = torch.tensor([self.orders(int(size), budget) for size in sizes])
        family = torch.tensor([self.family(max(1, int(size))) for size in sizes])[:, None]
        per = max(1, game.per_block // (1 << max(0, (n - 1).bit_length())))
        total = int(most.max())
        ends = {at * f for f in family.unique().tolist() for at in looks(-(-total // f))}  # whatever the others have
        ends = sorted(ends | {*range(per, total, per), total} - {0})
        for start, end in pairwise([0, *ends]):
            number = torch.arange(start, end)
            keys = _uniform(game, purpose, number // family, n).masked_fill(~game.own[:, None], 2.0)
            rank = self._varied(_ranks(keys), number % family, sizes[:, None, None].clamp(min=1))

            def make(at: Tensor, rank: Tensor = rank) -> Tensor:
                return rank[:, at // (n + 1)] < (at % (n + 1))[:, None]

            live = number < most[:, None]
            where = None if bool(live.all()) else live.repeat_interleave(n + 1, 1)
            yield Block(len(number) * (n + 1), make, where, order=rank.argsort(-1))

    def _varied(self, rank: Tensor, which: Tensor, sizes: Tensor) -> Tensor:
        """Make each order's place in its family of it, leaving players an example does not have at the end."""
        place, turned = rank, which[..., None]
        if self.rotated:
            place, turned = (rank + turned) % sizes, turned // sizes
        if self.antithetic:
            place = torch.where(turned == 1, sizes - 1 - place, place)
        return torch.where(rank < sizes, place, rank)


@dataclass(frozen=True)
class Bernoulli(Sampler):
    """Each player in or out on its own.

    Attributes:
        p: the probability that a player is kept.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p < 1:
            raise ConfigError(f"Bernoulli(p={self.p})", "a probability between 0 and 1", "half is p=0.5")

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        total = needed(budget, 1, "Bernoulli coalitions")
        for start in range(0, total, game.per_block):
            draws = torch.arange(start, min(start + game.per_block, total))
            masks = (_uniform(game, purpose, draws, game.players) < self.p) & game.own[:, None]
            yield Block(len(draws), lambda at, masks=masks: masks[:, at])

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return min(needed(budget, 1, "Bernoulli coalitions"), max(0, 2**players - 2))


@dataclass(frozen=True)
class UniformSizes(Sampler):
    """How many players are removed is drawn first, from one to all alike; then which, as LIME's code does for text.

    >>> import apportion as ap
    >>> game = ap.Game(ap.Field(lambda x: x.prod(1)).bind(torch.ones(1, 3)), ap.groups.Elements(), ap.fills.Baselines())
    >>> next(UniformSizes().blocks(game, budget=5)).masks.sum(-1).tolist()
    [[0, 0, 0, 0, 1]]
    """

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        total = needed(budget, 1, "coalitions of uniform size")
        for start in range(0, total, game.per_block):
            draws = torch.arange(start, min(start + game.per_block, total))
            keys = _uniform(game, purpose, draws, 1 + game.players)
            kept = (keys[..., :1] * game.sizes[:, None, None]).long()  # from 0 to one less than all
            rank = _ranks(keys[..., 1:].masked_fill(~game.own[:, None], 2.0))
            masks = rank < kept
            yield Block(len(draws), lambda at, masks=masks: masks[:, at])

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return min(needed(budget, 1, "coalitions of uniform size"), max(0, 2**players - 2))


@dataclass(frozen=True)
class KernelWeighted(Sampler):
    """Coalitions by the Shapley kernel, (n - 1) / (C(n, s) s (n - s)) for one of s players of n.

    Where the budget pays for all 2^n - 2 they are listed, weighted by the kernel; otherwise drawn by it, with
    equal weights. Weights of each example sum to 1. A budget that lists does not begin as one that draws.

    Attributes:
        paired: follow each drawn coalition by its complement.

    >>> import apportion as ap
    >>> game = ap.Game(ap.Field(lambda x: x.prod(1)).bind(torch.ones(1, 3)), ap.groups.Elements(), ap.fills.Baselines())
    >>> block = next(KernelWeighted().blocks(game, budget=6))
    >>> block.masks[0].int().tolist()[:3], [round(w, 4) for w in block.weight[0].tolist()[:3]]
    ([[1, 0, 0], [0, 1, 0], [1, 1, 0]], [0.1667, 0.1667, 0.1667])
    """

    begins_alike: ClassVar[bool] = False

    paired: bool = True

    def listed(self, players: int, budget: int) -> bool:
        """Tell whether the budget pays for every coalition."""
        return players < 30 and budget >= 2**players - 2

    def coalitions(self, players: int, budget: int | None = None) -> int:
        budget = needed(budget, 2, "coalitions by the Shapley kernel")
        return max(0, 2**players - 2) if self.listed(players, budget) else budget

    def repeats(self, players: int, budget: int | None = None) -> bool:
        return self.listed(players, needed(budget, 2, "coalitions by the Shapley kernel"))

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        budget = needed(budget, 2, "coalitions by the Shapley kernel")
        counts = torch.tensor([self.coalitions(int(n), budget) for n in game.sizes])
        every = torch.tensor([self.listed(int(n), budget) for n in game.sizes])
        size = game.per_block - game.per_block % 2
        for start in range(0, int(counts.max()), size):
            at = torch.arange(start, min(start + size, int(counts.max())))
            masks = torch.zeros(len(game.sizes), len(at), game.players, dtype=torch.bool)
            weight = torch.zeros(len(game.sizes), len(at), dtype=torch.float64)
            if not bool(every.all()):
                drawn = self._drawn(game, at, purpose)
                masks[~every] = drawn[~every]
                weight[~every] = 1 / counts[~every, None].double()
            for b in every.nonzero()[:, 0].tolist():
                n = int(game.sizes[b])
                masks[b, :, :n] = _bits(at + 1, n)
                weight[b] = shapley_kernel(n)[masks[b].sum(-1).clamp(max=n)]
            where = at < counts[:, None]
            weight = weight * where
            yield Block(len(at), lambda i, masks=masks: masks[:, i], None if bool(where.all()) else where, weight)

    def _drawn(self, game: Game, at: Tensor, purpose: str) -> Tensor:
        draws = torch.unique(at // 2) if self.paired else at
        keys = _uniform(game, purpose, draws, 1 + game.players)
        sizes = torch.zeros(len(game.sizes), len(draws), dtype=torch.long)
        for n in game.sizes.unique().tolist():
            if n > 1:
                s = torch.arange(1, n).double()
                steps = (1 / (s * (n - s))).cumsum(0)
                same = game.sizes == n
                place = torch.searchsorted(steps / steps[-1], keys[same, :, 0].double().contiguous())
                sizes[same] = 1 + place.clamp(max=n - 2)
        rank = _ranks(keys[..., 1:].masked_fill(~game.own[:, None], 2.0))
        masks = rank < sizes[..., None]
        if self.paired:
            masks = torch.stack([masks, ~masks & game.own[:, None]], 2).flatten(1, 2)[:, : len(at)]
        return masks


def shapley_kernel(players: int) -> Float[Tensor, " n"]:
    """Weigh one coalition of each size 0 to n by the Shapley kernel, over all coalitions summing to 1.

    The empty and the full coalition, whose weight is infinite, stand with 0.

    >>> [round(w, 4) for w in (11 * shapley_kernel(4)).tolist()]
    [0.0, 1.0, 0.5, 1.0, 0.0]
    """
    out = torch.zeros(players + 1, dtype=torch.float64)
    if players > 1:
        total = sum(1 / (s * (players - s)) for s in range(1, players))
        for s in range(1, players):
            out[s] = 1 / (s * (players - s)) / math.comb(players, s) / total
    return out


@dataclass(frozen=True)
class SmoothGrids(Sampler):
    """Soft masks of pixels: coarse random grids, enlarged bilinearly and shifted (RISE, Petsiuk et al. 2018).

    Each cell of a grid of `cells` by `cells` is 1 with probability p. The grid is enlarged to cells + 1 times
    ceil(H / cells) by as many times ceil(W / cells) pixels, and an H by W window of it taken at random within the
    first cell. The mean of a mask is p at every pixel. Rows of features have nothing to be smooth along: each is kept
    on its own, as every pixel is without `cells`.

    Attributes:
        cells: along each side of the grid; None for hard masks.
        p: the probability that a cell is kept.

    Raises:
        InputError: players that are not the pixels of pictures.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(torch.rand(1, 3, 9, 9))
    >>> block = next(SmoothGrids(3).blocks(ap.Game(q, ap.groups.Pixels(), ap.fills.Baselines()), budget=4))
    >>> block.masks.shape, bool(((block.masks >= 0) & (block.masks <= 1)).all())
    (torch.Size([1, 4, 81]), True)
    """

    cells: int | None = 7
    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p < 1:
            raise ConfigError(f"SmoothGrids(p={self.p})", "a probability between 0 and 1", "half is p=0.5")
        if self.cells is not None and self.cells < 1:
            raise ConfigError(f"SmoothGrids(cells={self.cells})", "at least one cell, or None", "write cells=7")

    def blocks(self, game: Game, budget: int | None = None, purpose: str = "coalitions") -> Iterator[Block]:
        total = needed(budget, 1, "smooth masks")
        x = game.question.x
        if not isinstance(x, Tensor) or x.ndim != 4 or game.players != x.shape[2] * x.shape[3]:
            raise InputError(f"smooth grids of {game.players} players", "one for each pixel", "give ap.groups.Pixels()")
        stream, like = game.question.stream(purpose), torch.zeros(1, *x.shape[1:])
        for start in range(0, total, game.per_block):
            draws = torch.arange(start, min(start + game.per_block, total))
            owner = torch.arange(len(x)).repeat_interleave(len(draws))
            masks = self.masks(stream, like, owner, draws.repeat(len(x))).reshape(len(x), len(draws), -1)
            yield Block(len(draws), lambda at, masks=masks: masks[:, at])

    def masks(
        self, stream: Stream, like: Float[Tensor, "b ..."], owner: Owner, draw: Int[Tensor, " R"]
    ) -> Float[Tensor, "R ..."]:
        """Make masks one by one.

        Args:
            stream: of random numbers.
            like: examples, [B, channels, *space] or [B, features], for shape, dtype and device.
            owner: the example each mask is for.
            draw: which of its masks.

        Returns:
            Masks in [0, 1], [R, 1, *space] or [R, features].
        """
        space = like.shape[2:]
        if self.cells is None or not space:
            shape = (1, *space) if space else like.shape[1:]
            return (stream.uniform(like.new_zeros(1, *shape), owner, draw) < self.p).to(like.dtype)
        number = stream.uniform(like.new_zeros(1, len(space) + self.cells ** len(space)), owner, draw)
        mask = (number[:, len(space) :] < self.p).to(like.dtype).reshape(-1, *[self.cells] * len(space))
        each = torch.eye(self.cells, dtype=like.dtype, device=like.device)[None]
        for axis, length in enumerate(space):
            cell = -(-length // self.cells)
            large = F.interpolate(each, (self.cells + 1) * cell, mode="linear")[0].T
            first = (number[:, axis] * cell).long().clamp(max=cell - 1)
            rows = large[first[:, None] + torch.arange(length, device=like.device)]  # shares of cells
            others = mask.movedim(axis + 1, 1)
            laid = torch.bmm(rows, others.reshape(len(rows), self.cells, -1))
            mask = laid.reshape(len(rows), length, *others.shape[2:]).movedim(1, axis + 1)
        return mask.clamp(0, 1)[:, None]

    def coalitions(self, players: int, budget: int | None = None) -> int:
        return needed(budget, 1, "smooth masks")
