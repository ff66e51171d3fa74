"""Semivalues."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Paper, Principle
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.masks.estimators import Sums, estimated, listed
from apportion.parts.masks.explainer import GameMethod
from apportion.parts.masks.sampled import warn_random
from apportion.parts.masks.weights import LeaveOneOutWeights, SizeWeights

MOST = 1 << 20
"""Coalitions that may be listed."""

CARD = Card(
    title="Semivalue",
    paper=Paper(
        "Dubey, Neyman, Weber", 1981, "Value theory without efficiency", "Mathematics of Operations Research 6"
    ),
    kind=Kind.SALIENCE,
    intent="What a player adds to coalitions of the others, averaged with a weight for each size; all of them played.",
    cost="every coalition of a size that counts: n for leave-one-out, 2^n for Shapley and Banzhaf, with n players",
    families=(Family.PERTURBATION, Family.GAME, Family.REMOVAL),
    unjudged="Deng et al. 2025 judge Shapley values, Banzhaf values and leave-one-out, and no others of the family",
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
        "Only Shapley's weights make the values sum to the score's difference; others weigh sizes by another taste.",
        "What stands in for an absent player is part of the question: another fill, another game.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class Semivalue(GameMethod):
    """φ_i = Σ_{S∌i} p(|S|) [v(S ∪ i) - v(S)] with Σ_s C(n-1, s) p(s) = 1, exact; Dubey, Neyman, Weber 1981.

    Every semivalue is linear, symmetric, and gives a player that adds nothing 0. Only coalitions of a size with a
    weight are played, so that leave-one-out takes any number of players. Values are in units of the score; an absent
    player is what `fill` makes of it.

    Attributes:
        weights: p, one of `ap.semivalues`.

    Raises:
        InputError: more coalitions than 2^20.

    >>> import torch, apportion as ap
    >>> both = ap.Field(lambda x: x.prod(1))
    >>> occlusion = ap.Semivalue(weights=ap.semivalues.LeaveOneOutWeights())
    >>> occlusion(both, torch.tensor([[2.0, 3.0]])).values.tolist()
    [[6.0, 6.0]]
    """

    weights: SizeWeights = LeaveOneOutWeights()

    def explain(self, q: Question) -> Attribution:
        game = self.game(q)
        count = self._count(game.players)
        if count > MOST:
            raise InputError(
                f"{type(self.weights).__name__} of {game.players} players, for which {count:.3g} coalitions count",
                f"at most {MOST:,}",
                "make fewer players with ap.groups.Squares or Labels, or sample with ap.Shapley or ap.Banzhaf",
            )
        found = estimated(listed(game, game.sizes >= 0, self.weights), Sums(game, self.weights))
        warn_random(self, q)
        return self.answer(q, game, found.values)

    def _count(self, players: int) -> int:
        return sum(comb(players, s) for s in self.weights.sizes(players))

    def passes(self, q: Question | None = None) -> Passes:
        if q is None:
            raise ConfigError(
                "passes of Semivalue without a question",
                "one, since they grow with the number of players",
                "write passes(field.bind(x))",
            )
        game = self.game(q)
        n, empty = game.players, 0 in self.weights.sizes(game.players)
        return self.passes_of(self._count(n) - 1 - empty, exact=not game.is_ragged, empty=empty)
