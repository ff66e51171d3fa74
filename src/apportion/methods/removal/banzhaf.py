"""Banzhaf values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.masks.estimators import Differences, Estimate, Sums, estimated, listed
from apportion.parts.masks.sampled import COST, LISTED, SAMPLED, SampledMethod
from apportion.parts.masks.samplers import AllSubsets, Bernoulli
from apportion.parts.masks.weights import BanzhafWeights

CARD = Card(
    title="Banzhaf values",
    paper=Paper(
        "Banzhaf",
        1965,
        "Weighted voting doesn't work: a mathematical analysis",
        "Rutgers Law Review 19; sampled as by Wang, Jia 2023, Data Banzhaf, AISTATS",
    ),
    kind=Kind.SALIENCE,
    intent="What a player adds to the others, each of whom is there or not by the toss of a coin.",
    cost=COST,
    exact_cost=False,
    families=(Family.PERTURBATION, Family.GAME, Family.REMOVAL),
    unjudged="Deng et al. 2025 place it among games and removals, and state of it 2-efficiency, which no table judges",
    claims=(Claim(Principle.COMPLETENESS, holds=False, source="Dubey, Shapley 1979: 2-efficient instead"),),
    measured={
        Principle.COMPLETENESS: False,
        Principle.SENSITIVITY: True,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: False,
    },
    cautions=(
        "Values do not sum to the score's difference; two players merged into one get what both had (2-efficiency).",
        "With many players nearly all coalitions drawn hold about half of them: small ones are never seen.",
        SAMPLED,
        "Sampled, intervals of 1.96 standard errors hold the value in 94 of 100 draws of 32 or 64 coalitions, in 95 "
        "of 128, of a smooth game of 12 players.",
    ),
)


_FORETOLD = 1 << 16
"""Entries of masks up to which it is seen beforehand whether the budget will do."""
_MOST = 1 << 14
"""Coalitions searched for a budget that will."""


@register(CARD)
@dataclass(frozen=True)
class Banzhaf(SampledMethod):
    """φ_i = 2^-(n-1) Σ_{S∌i} [v(S ∪ i) - v(S)] = E[v(S) | i ∈ S] - E[v(S) | i ∉ S]; Banzhaf 1965.

    Exact where the budget pays for every coalition, up to 20 players; otherwise the difference of the two means over
    coalitions drawn with each player in or out, of which every one serves every player (maximum sample reuse, Wang
    and Jia 2023), unbiased unless it stops early. Values are in units of the score, parts those of `Shapley`,
    where degrees of freedom are the fewest coalitions that a player was in, or out of, less 1. Where v is the same in
    all of either kind the standard error is a bound by the rule of three.

    Attributes:
        sampler: the probability with which players are there, 1/2 for Banzhaf values; `AllSubsets()` for no drawing;
            None decides by the budget, for each example.
        budget, precision: as for `Shapley`; the same coalition drawn twice is paid for once.

    Raises:
        ConfigError: a budget so small that a player is not met twice with and twice without.
        InputError: `AllSubsets` for more players than it takes.

    >>> import torch, apportion as ap
    >>> a = ap.Banzhaf()(ap.Field(lambda x: x.prod(1)), torch.tensor([[1.0, 2.0, 3.0]]))
    >>> a.values.tolist()       # a quarter each: both others must be there
    [[1.5, 1.5, 1.5]]
    """

    sampler: AllSubsets | Bernoulli | None = None

    def explain(self, q: Question) -> Attribution:
        game = self.game(q)
        found = self._estimate(game)
        parts = self.record(q, game, found)
        return self.answer(q, game, found.values, standard_error=found.standard_error, parts=parts)

    def _estimate(self, game: Game) -> Estimate:
        weights = BanzhafWeights()
        if isinstance(self.sampler, AllSubsets):
            return estimated(self.sampler.blocks(game), Sums(game, weights))
        drawn = ~self.affordable(game) | (self.sampler is not None)
        known = estimated(listed(game, ~drawn, weights), Sums(game, weights))
        if not bool(drawn.any()):
            return known
        sampler, means = Bernoulli() if self.sampler is None else self.sampler, Differences(game)
        if self.budget * game.players < _FORETOLD:
            self._met_twice(game, sampler, drawn, self.budget)
        blocks = (b.among(drawn) for b in sampler.blocks(game, self.budget))
        found = estimated(blocks, means, self.precision)
        on = drawn.to(means.own.device)
        fewest = means.counts.amin(1)[means.own & on[:, None]].min()
        if fewest < 2:
            self._met_twice(game, sampler, drawn, self.budget)
        return found.where(on, known)

    def _met_twice(self, game: Game, sampler: Bernoulli, drawn: Tensor, budget: int) -> None:
        """See that each player is in two of the coalitions drawn and out of two.

        Raises:
            ConfigError: some is not, with the budget at which all are.
        """
        own, seen = game.own[drawn], 0
        counts = torch.zeros(len(own), 2, game.players, dtype=torch.int32)
        for block in sampler.blocks(game, max(budget, _MOST)):
            masks = block.masks.expand(len(drawn), -1, -1)[drawn]
            met = counts[:, None] + torch.stack([~masks, masks], 2).int().cumsum(1)
            enough = ((met >= 2) | ~own[:, None, None]).all(3).all(2).all(0)
            if bool(enough.any()):
                least = seen + 1 + int(enough.int().argmax())
                break
            counts, seen = met[:, -1].int(), seen + block.size
        else:
            least = 2 * seen
        if least <= budget:
            return
        players = int(game.sizes[drawn].max())
        least = min(least, 2**players - 2) if self.sampler is None and players <= LISTED else least
        raise ConfigError(
            f"budget={budget} for {players} players, of which one is in, or out of, less than two coalitions",
            f"at least {least} coalitions, by those drawn with this seed, for their spread",
            f"give budget={least} or more{'' if self.sampler is None else ', or take p nearer to 1/2'}",
        )

    def passes(self, q: Question | None = None) -> Passes:
        if isinstance(self.sampler, AllSubsets) and q is not None:
            return self.passes_of(self.sampler.coalitions(self.game(q).players), exact=False)
        return self.at_most(q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(budget=64), cls(sampler=Bernoulli(0.7), budget=64, precision=0.01))
