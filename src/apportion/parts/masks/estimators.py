"""Estimators: what is made of coalitions and their values, block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, combinations
from math import comb, factorial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.errors import ConfigError
from apportion.core.game import Block, Game
from apportion.parts.masks.looks import LEAST, later
from apportion.parts.masks.weights import SizeWeights

_AT_ONCE = 1 << 14
"""Coalitions listed at once."""


class Estimate(NamedTuple):
    """What is known of each player.

    Attributes:
        values: [B, P], in float64.
        standard_error: of each value, over the coalitions drawn; 0 where none are.
        own: which players each example has, [B, P]; all unless given.
        freedom: degrees of freedom of each standard error, [B, P]; infinite, unless given, as where none are drawn.
        bounded: which standard errors are upper bounds, since the draws did not vary, [B, P]; none unless given.
    """

    values: Float[Tensor, "B P"]
    standard_error: Float[Tensor, "B P"]
    own: Bool[Tensor, "B P"] | None = None
    freedom: Float[Tensor, "B P"] | None = None
    bounded: Bool[Tensor, "B P"] | None = None

    @property
    def fewest(self) -> Float[Tensor, " B"]:
        """The fewest degrees of freedom of a standard error of the players there are."""
        if self.freedom is None:
            return torch.full_like(self.values[:, 0], torch.inf)
        absent = torch.zeros_like(self.values, dtype=torch.bool) if self.own is None else ~self.own
        return self.freedom.masked_fill(absent, torch.inf).amin(1)

    @property
    def precision(self) -> Float[Tensor, " B"]:
        """The largest standard error over the range of the values of the players there are.

        0 where there are no errors at all, infinite where they are not known.
        """
        absent = torch.zeros_like(self.values, dtype=torch.bool) if self.own is None else ~self.own
        worst = self.standard_error.masked_fill(absent, 0).amax(1)
        wide = self.values.masked_fill(absent, -torch.inf).amax(1) - self.values.masked_fill(absent, torch.inf).amin(1)
        return torch.where(worst > 0, worst / wide, worst).nan_to_num(torch.inf, torch.inf)

    def where(self, which: Bool[Tensor, " B"], other: Estimate) -> Estimate:
        """Take these for some examples, and others elsewhere."""
        at, endless = which[:, None], torch.full_like(self.values, torch.inf)
        none = torch.zeros_like(self.values, dtype=torch.bool)
        freedom = [endless if f.freedom is None else f.freedom for f in (self, other)]
        bounded = [none if f.bounded is None else f.bounded for f in (self, other)]
        return Estimate(
            torch.where(at, self.values, other.values),
            torch.where(at, self.standard_error, other.standard_error),
            self.own,
            torch.where(at, *freedom),
            torch.where(at, *bounded),
        )


RARE = 1.5
"""Three, by the rule of three, over the 1.96 standard errors of an interval."""


def unvaried(spread: Tensor, scale: Tensor, dtype: torch.dtype) -> Bool[Tensor, "..."]:
    """Tell what was the same in all draws, but for rounding of values of so large a scale."""
    return spread <= 16 * torch.finfo(dtype).eps * scale


class Estimator(ABC):
    """Takes coalitions with their values, and estimates.

    Attributes:
        game: whose players they are.
        own: which players each example has, [B, P].
        units: independent draws taken in so far, of each example.
        ready: of which examples the precision may be judged, [B].
    """

    def __init__(self, game: Game) -> None:
        """Begin with nothing."""
        self.game = game
        self.own = game.own.to(game.question.device)
        self.units = torch.zeros(len(self.own), dtype=torch.long, device=self.own.device)

    @property
    def ready(self) -> Bool[Tensor, " B"]:
        return torch.ones_like(self.units, dtype=torch.bool)

    def check(self) -> None:  # noqa: B027 - most estimate from anything
        """See that what was taken in tells the values."""

    @abstractmethod
    def add(self, block: Block, values: Float[Tensor, "B S"]) -> None:
        """Take a block in."""

    @abstractmethod
    def estimate(self) -> Estimate:
        """Estimate from all that was taken in."""

    def zeros(self, *shape: int) -> Tensor:
        """Make a float64 tensor where the examples are."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.own.device)

    def _masks(self, block: Block) -> tuple[Tensor, Tensor]:
        """Give masks [B, S, P] of players that are there, and which of them were asked, [B, S]."""
        masks = block.masks.to(self.own.device)
        masks = masks.expand(len(self.own), *masks.shape[-2:]) & self.own[:, None]
        asked = torch.ones_like(masks[..., 0]) if block.where is None else block.where.to(masks.device)
        return masks, asked


class Sums(Estimator):
    """Semivalues from every coalition that counts, each once: φ_i = Σ_S (p(|S|-1) [i ∈ S] - p(|S|) [i ∉ S]) v(S)."""

    def __init__(self, game: Game, weights: SizeWeights) -> None:
        super().__init__(game)
        batch, players = self.own.shape
        self.table = self.zeros(batch, players + 2)
        for n in game.sizes.unique().tolist():  # p(s) stands at s + 1, with 0 around it
            self.table[game.sizes == n, 1 : n + 1] = weights.of(n).to(self.table.device)
        self.total = self.zeros(batch, players)
        self.full = game.question.fx.double()[:, None]  # values are counted from it, so that few digits are lost

    def add(self, block: Block, values: Tensor) -> None:
        masks, asked = self._masks(block)
        size = masks.sum(2)
        inside, outside = self.table.gather(1, size), self.table.gather(1, size + 1)
        v = (values.double() - self.full) * asked
        self.total += torch.einsum("bs,bsp->bp", v * (inside + outside), masks.double())
        self.total -= (v * outside).sum(1, keepdim=True)

    def estimate(self) -> Estimate:
        values = self.total.masked_fill(~self.own, 0)
        return Estimate(values, torch.zeros_like(values), self.own)


class Chains(Estimator):
    """The mean of what each player adds where it enters, over orders in which players come in.

    Orders come in families that are drawn independently of each other, such as an order and its reverse: the spread
    of the families' means tells the standard error (moments by Chan, Golub and LeVeque 1979).

    Where a player's mean is the same in all m families that says only that others are rare: in less than 3 / m of the
    orders, with 95 % confidence (rule of three; Hanley and Lippman-Hand 1983). Were it to differ there by the range r
    of all players' gains, and 0, the value would be off by 3 r / m: its standard error is set to 1.5 r / m, an upper
    bound as far as r is one.
    """

    def __init__(self, game: Game, family: Callable[[int], int] = lambda players: 1) -> None:
        """Set up.

        Args:
            game: whose players they are.
            family: tells how many orders are drawn together, for a number of players.
        """
        super().__init__(game)
        batch, players = self.own.shape
        self.family = torch.tensor([family(max(1, n)) for n in game.sizes.tolist()], device=self.own.device)[:, None]
        self.begun, self.count, self.seen = self.zeros(batch, players), self.zeros(batch, 1), 0
        self.mean, self.squares = self.zeros(batch, players), self.zeros(batch, players)
        self.low, self.high = self.zeros(batch, players) + torch.inf, self.zeros(batch, players) - torch.inf
        self.scale, self.dtype = self.zeros(batch, 1), torch.float64
        every = [factorial(n) <= int(f) for n, f in zip(game.sizes.tolist(), self.family[:, 0], strict=True)]
        self.every = torch.tensor(every, device=self.own.device)[:, None]  # whose family holds all orders there are

    def add(self, block: Block, values: Tensor) -> None:
        assert block.order is not None  # blocks of permutations have one
        order = block.order.to(values.device)
        batch, m, players = order.shape
        steps = values.double().reshape(batch, m, players + 1).diff(dim=2)
        self.scale, self.dtype = self.scale.maximum(values.double().abs().amax(1, keepdim=True)), values.dtype
        gains = torch.zeros_like(steps).scatter(2, order, steps)
        number = self.seen + torch.arange(m, device=order.device)
        whose = number // self.family - self.seen // self.family
        most = int(whose.max()) + 1
        sums = self.zeros(batch, most, players).scatter_add_(1, whose[..., None].expand(-1, -1, players), gains)
        sums[:, 0] += self.begun
        asked = torch.ones_like(whose, dtype=torch.bool)
        if block.where is not None:
            asked = block.where.to(order.device).reshape(batch, m, players + 1)[..., 0]
        ends = ((number + 1) % self.family == 0) & asked
        self.begun = torch.where(
            (self.seen + m) % self.family == 0, 0.0, sums.gather(1, whose[:, -1:, None].expand(-1, -1, players))[:, 0]
        )
        self.seen += m
        on = torch.zeros_like(sums[..., 0]).scatter_add_(1, whose, ends.double())[..., None]
        units = sums / self.family[..., None]
        new = on.sum(1)
        mean = (units * on).sum(1) / new.clamp(min=1)
        within = ((units - mean[:, None]).square() * on).sum(1)
        total, apart = (self.count + new).clamp(min=1), mean - self.mean
        self.squares += within + apart.square() * self.count * new / total
        self.mean += apart * new / total
        self.count += new
        self.low = self.low.minimum(units.masked_fill(on == 0, torch.inf).amin(1))
        self.high = self.high.maximum(units.masked_fill(on == 0, -torch.inf).amax(1))
        self.units = self.count[:, 0].long()

    def estimate(self) -> Estimate:
        error = torch.where(self.count > 1, self.squares / (self.count - 1) / self.count, torch.inf).sqrt()
        high, low = (t.masked_fill(~self.own, 0) for t in (self.high, self.low))
        most = (high.amax(1) - low.amin(1)).maximum(high.amax(1)).maximum(-low.amin(1))[:, None]
        bound = RARE * most / self.count.clamp(min=1)
        drawn = self.own & ~self.every
        bounded = drawn & unvaried(high - low, self.scale, self.dtype) & (self.count > 1) & (bound > error)
        error = torch.where(bounded, bound, error).masked_fill(~self.own, 0)
        freedom = (self.count - 1).clamp(min=0).expand_as(error).masked_fill(~drawn, torch.inf)
        return Estimate(self.mean, error, self.own, freedom, bounded)


class Differences(Estimator):
    """The mean of v with each player less the mean without: every coalition serves all players (Wang and Jia 2023).

    Where v did not vary among the coalitions with a player, nor among those without, the standard error is the
    bound that `Chains` has, with the range of v on each side, that of all players and, where a baseline's score tells
    it, of none included. Without that, and with no range at all, it is infinite.
    """

    def __init__(self, game: Game) -> None:
        super().__init__(game)
        batch, players = self.own.shape
        self.sums = self.zeros(3, batch, 2, players)
        self.full = game.question.fx.double()[:, None]  # as for sums
        empty = game.known_empty
        other = self.full * 0 if empty is None else empty.double()[:, None] - self.full
        self.low, self.high = other.clamp(max=0), other.clamp(min=0)  # of v less that of all players
        self.told = empty is not None
        self.dtype = game.question.fx.dtype

    def add(self, block: Block, values: Tensor) -> None:
        masks, asked = self._masks(block)
        sides = torch.stack([~masks, masks], 1).double() * asked[:, None, :, None]
        v = values.double() - self.full
        self.low = self.low.minimum((v * asked).amin(1, keepdim=True))
        self.high = self.high.maximum((v * asked).amax(1, keepdim=True))
        self.sums += torch.einsum("kbs,bcsp->kbcp", torch.stack([torch.ones_like(v), v, v * v]), sides)
        self.units = self.sums[0].sum(1).amax(1).long()

    @property
    def counts(self) -> Float[Tensor, "B 2 P"]:
        """How many coalitions were without each player, and how many with it."""
        return self.sums[0]

    def estimate(self) -> Estimate:
        count, total, squares = self.sums
        mean = total / count
        within = (squares - total * mean).clamp(min=0) / (count - 1)
        error, spread = (within / count).sum(1).sqrt(), self.high - self.low
        bound = RARE * spread * count.clamp(min=1).square().reciprocal().sum(1).sqrt()
        same = unvaried(within.amax(1).sqrt(), spread + self.full.abs(), self.dtype)
        bound = bound if self.told else bound.masked_fill(spread == 0, torch.inf)  # of what nothing is known to vary
        bounded = self.own & same & (bound > error)
        values = (mean[:, 1] - mean[:, 0]).masked_fill(~self.own, 0)
        error = torch.where(bounded, bound, error).masked_fill(~self.own, 0)
        freedom = (count.amin(1) - 1).clamp(min=0).masked_fill(~self.own, torch.inf)
        return Estimate(values, error, self.own, freedom, bounded)


class LeastSquares(Estimator):
    """argmin_φ Σ_S w(S) (v(S) - v(∅) - Σ_{i∈S} φ_i)² with Σ φ = v(N) - v(∅), the constraint eliminated by player 0.

    Standard errors are those of a weighted regression whose residuals spread as they do (White 1980), coalitions
    taken together by unit and each unit's residual divided by 1 - its leverage, as if it had been left out of the fit
    (HC3; MacKinnon and White 1985). They are infinite where a unit alone decides a direction, as with no more units
    than unknowns. Of the coalitions drawn a few bytes each are kept for them.
    """

    def __init__(self, game: Game, unit: int, empty: Float[Tensor, " B"], drawn: Bool[Tensor, " B"]) -> None:
        """Set up.

        Args:
            game: whose players they are.
            unit: coalitions drawn together, such as one and its complement.
            empty: v of no player.
            drawn: for which examples coalitions are drawn, rather than listed.
        """
        super().__init__(game)
        batch, players = self.own.shape
        self.unit, self.drawn = unit, drawn.to(self.own.device)
        self.empty, self.total = empty.double(), game.question.fx.double() - empty.double()
        self.square, self.product = self.zeros(batch, players - 1, players - 1), self.zeros(batch, players - 1)
        self.seen: list[tuple[np.ndarray, Tensor, Tensor]] = []

    def _equations(self, masks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Give rows [B, S, P-1] and right sides [B, S] once φ_0 = total - Σ others is put in."""
        z = masks.double()
        rows = (z[..., 1:] - z[..., :1]) * self.own[:, None, 1:]
        return rows, values.double() - self.empty[:, None] - z[..., 0] * self.total[:, None]

    def add(self, block: Block, values: Tensor) -> None:
        masks, asked = self._masks(block)
        assert block.weight is not None  # these samplers weigh their coalitions
        weight = block.weight.to(asked.device).expand(len(asked), -1).double() * asked
        rows, right = self._equations(masks, values)
        self.square += (rows * weight[..., None]).mT @ rows
        self.product += (rows.mT @ (weight * right)[..., None])[..., 0]
        self.units += asked.sum(1) // self.unit
        if bool(self.drawn.any()):
            self.seen.append((np.packbits(masks.cpu().numpy(), axis=-1), values, weight))

    @property
    def solvable(self) -> Bool[Tensor, " B"]:
        """Of which examples the coalitions tell all players apart."""
        return self._solvable(self._equal())

    @property
    def ready(self) -> Tensor:
        """Those drawn, once there are twice as many units as unknowns: before, the fit leaves little to judge by."""
        return self.drawn & (self.units >= 2 * (self.own.sum(1) - 1)) & self.solvable

    def _equal(self) -> Tensor:
        return self.square + torch.diag_embed((~self.own[:, 1:]).double())  # apart from those not there

    def _solvable(self, square: Tensor) -> Tensor:
        if not square.shape[1]:
            return torch.ones_like(self.drawn)
        scale = square.diagonal(dim1=1, dim2=2).clamp(min=1e-300).rsqrt()
        return torch.linalg.eigvalsh(scale[:, :, None] * square * scale[:, None])[:, 0] > 1e-10

    def check(self) -> None:
        """See that the coalitions tell all players apart.

        Raises:
            ConfigError: they do not.
        """
        short = ~self.solvable
        if bool(short.any()):
            b = int(short.nonzero()[0])
            raise apart(int(self.units[b]) * self.unit, int(self.own[b].sum()), 2 * int(self.units[b]) * self.unit)

    def estimate(self) -> Estimate:
        """Solve; what cannot be solved yet is not a number."""
        square = self._equal()
        solvable = self._solvable(square)[:, None]
        square = torch.where(solvable[..., None], square, torch.eye(square.shape[1]).to(square))
        inverse = torch.linalg.inv(square).masked_fill(~solvable[..., None], torch.nan)
        others = (inverse @ self.product[..., None])[..., 0]
        values = torch.cat([self.total[:, None] - others.sum(1, keepdim=True), others], 1)
        errors = self._errors(others, inverse) if self.seen else torch.zeros_like(values)
        left = (self.units - self.own.sum(1) + 1).clamp(min=0).double().masked_fill(~self.drawn, torch.inf)
        return Estimate(values, errors, self.own, left[:, None].expand_as(values))

    def _errors(self, others: Tensor, inverse: Tensor) -> Tensor:
        middle, alone = torch.zeros_like(self.square), torch.zeros_like(self.drawn)
        for packed, values, weight in self.seen:
            found = np.unpackbits(packed, axis=-1, count=self.own.shape[1])
            rows, right = self._equations(torch.from_numpy(found).to(values.device), values)
            pull = rows * ((right - (rows @ others[..., None])[..., 0]) * weight)[..., None]
            pull = pull.reshape(len(pull), -1, self.unit, pull.shape[2]).sum(2)
            # rows of a unit, of a coalition and its complement, are one vector and its negative: leverages add up
            free = 1 - ((rows @ inverse * rows).sum(2) * weight).reshape(len(pull), -1, self.unit).sum(2)
            alone |= ~(free > 1e-9).all(1)
            pull = pull / free.clamp(min=1e-9)[..., None]
            middle += pull.mT @ pull
        spread = inverse @ middle @ inverse
        first = spread.sum((1, 2))[:, None]  # of player 0, which is the total less the others
        variance = torch.cat([first, spread.diagonal(dim1=1, dim2=2)], 1).clamp(min=0)
        variance = variance.masked_fill(alone[:, None], torch.inf)
        return variance.sqrt().masked_fill(~(self.own & self.drawn[:, None]), 0)


def apart(count: int, players: int, least: int) -> ConfigError:
    """Say that coalitions do not tell players apart, and how many may."""
    return ConfigError(
        f"{count} coalitions that do not tell {players} players apart",
        f"about {least}, by the coalitions drawn with this seed",
        f"give budget={least} or more, or make fewer players; nothing is added that would make the equations solvable",
    )


def listed(game: Game, which: Bool[Tensor, " B"], weights: SizeWeights) -> Iterator[Block]:
    """List the coalitions that count, of some examples, by size.

    Args:
        game: whose players they are.
        which: the examples.
        weights: tell which sizes count.
    """
    for n in game.sizes[which].unique().tolist():
        asked = (which & (game.sizes == n))[:, None]
        for size in weights.sizes(n):
            few = min(size, n - size)  # the members, or those who are not
            count = comb(n, few)
            each = np.fromiter(chain.from_iterable(combinations(range(n), few)), dtype=np.int64, count=count * few)
            named, whole = torch.from_numpy(each).reshape(count, few), torch.arange(game.players) < n
            for part in named.split(_AT_ONCE):

                def make(at: Tensor, part: Tensor = part, out: bool = few < size, whole: Tensor = whole) -> Tensor:
                    there = torch.zeros(len(at), game.players, dtype=torch.bool).scatter(1, part[at], True)
                    return ~there & whole if out else there

                yield Block(len(part), make, None if bool(asked.all()) else asked.expand(-1, len(part)))


def each_alone(found: Estimate) -> Tensor:
    """Judge every example by its own precision."""
    return found.precision


def estimated(
    blocks: Iterable[Block],
    estimator: Estimator,
    precision: float | None = None,
    judge: Callable[[Estimate], Float[Tensor, " B"]] = each_alone,
) -> Estimate:
    """Play blocks until they end, or until an example's values are known as precisely as wished.

    Args:
        blocks: of coalitions.
        estimator: what is made of them.
        precision: the largest standard error over the range of the values at which no more are asked.
        judge: tells the precision reached.
    """
    game, due = estimator.game, torch.full_like(estimator.units, LEAST)
    active = torch.ones(len(game.question), dtype=torch.bool)
    for block in blocks:
        block = block if bool(active.all()) else block.among(active)
        estimator.add(block, game.value(block))
        if precision is None or not bool((looked := estimator.units >= due).any()):
            continue
        due = torch.where(looked, later(estimator.units), due)
        if bool((looked := looked & estimator.ready).any()):
            active &= (~looked | (judge(estimator.estimate()) > precision)).cpu()
            if not bool(active.any()):
                break
    estimator.check()
    return estimator.estimate()


__all__ = [
    "Chains",
    "Differences",
    "Estimate",
    "Estimator",
    "LeastSquares",
    "Sums",
    "apart",
    "each_alone",
    "estimated",
    "listed",
]
