"""Shapley values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle, Total
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.masks.sampled import COST, SAMPLED, OrderMethod

FAITHFUL = tuple(
    Claim(principle, holds=True, source="Deng et al. 2025, Table VI, of Shapley values")
    for principle in (
        Principle.LOCAL_ACCURACY,
        Principle.MISSINGNESS,
        Principle.CONSISTENCY,
        Principle.ALLOCATION_FIDELITY,
    )
)
"""What is claimed of Shapley values, however they are computed."""

CARD = Card(
    title="Shapley values",
    paper=Paper(
        "Shapley",
        1953,
        "A value for n-person games",
        "Contributions to the Theory of Games II; sampled as by Strumbelj, Kononenko 2010, JMLR 11",
    ),
    kind=Kind.SALIENCE,
    intent="What a player adds to those before it, averaged over all orders in which players may come in.",
    cost=COST,
    exact_cost=False,
    families=(
        Family.PERTURBATION,
        Family.ADDITIVE,
        Family.GAME,
        Family.PATH,
        Family.REMOVAL,
        Family.TAYLOR,
    ),
    claims=FAITHFUL,
    measured={
        Principle.COMPLETENESS: True,
        Principle.SENSITIVITY: True,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: False,
    },
    total=Total.DIFFERENCE,
    cautions=(
        SAMPLED,
        "Sampled, intervals of 1.96 standard errors hold the value in 70, 87, 92, 93 and 94 of 100 draws of 2, 5, 10, "
        "20 and 40 orders of a smooth game of 12; Student's t holds it in 94 to 95.",
        "Sampled values treat equal players alike on average only.",
        "What stands in for an absent player is part of the question: points that no data resemble are scored, too.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class Shapley(OrderMethod):
    """φ_i = Σ_{S∌i} |S|! (n - |S| - 1)! / n! · [v(S ∪ i) - v(S)]; Shapley 1953.

    Exact where the budget pays for every coalition, up to 20 players; otherwise the mean over orders drawn at random
    of what each player adds where it comes in, which sums to v(N) - v(∅) order by order and is unbiased, unless it
    stops early. Values are in units of the score. `parts["standard_error"]` is for the drawing of
    orders, 0 where all coalitions are played. Where a player adds the same in all m families of orders it is a bound,
    1.5 / m of the range of gains (rule of three). `parts["degrees_of_freedom"]` [B] is m - 1; below 19 a warning asks
    for Student's t in place of 1.96. `parts["coalitions"]` [B] counts what was evaluated, and `parts["precision"]` [B]
    is the largest standard error over the range of the values. A fill that draws at random is drawn once for each
    coalition, and a warning says that the values hold for that draw.

    Attributes:
        sampler: which orders are drawn, one of `ap.samplers.Permutations`; `AllSubsets()` for none; None decides by
            the budget, for each example.
        budget: coalitions evaluated for each example, at most, without the empty and the full one.
        precision: stop where `parts["precision"]` is down to this; None spends the budget. Stopping by what was seen
            biases a little.

    Raises:
        ConfigError: a budget for less than two independent draws, without which there is no standard error.
        InputError: `AllSubsets` for more players than it takes.

    >>> import torch, apportion as ap
    >>> a = ap.Shapley()(ap.Field(lambda x: x.prod(1)), torch.tensor([[2.0, 3.0]]))
    >>> a.values.tolist(), a.parts["coalitions"].tolist()      # each alone makes 0
    ([[3.0, 3.0]], [2])
    """

    def explain(self, q: Question) -> Attribution:
        game = self.game(q)
        found = self.estimate(game)
        empty = game.value(torch.zeros(1, game.players, dtype=torch.bool))[:, 0]
        return self.answer(
            q,
            game,
            found.values,
            standard_error=found.standard_error,
            claimed_total=q.fx - empty,
            parts=self.record(q, game, found),
        )

    def passes(self, q: Question | None = None) -> Passes:
        return self.at_most(q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(budget=254, precision=0.01),)
