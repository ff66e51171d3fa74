"""KernelSHAP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Paper, Principle, Total
from apportion.core.explainer import Explainer, Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.methods.removal.shapley import FAITHFUL
from apportion.parts.masks.estimators import LeastSquares, apart, estimated
from apportion.parts.masks.sampled import COST, SampledMethod
from apportion.parts.masks.samplers import KernelWeighted

CARD = Card(
    title="KernelSHAP",
    paper=Paper(
        "Lundberg, Lee", 2017, "A unified approach to interpreting model predictions", "NeurIPS 2017, arXiv:1705.07874"
    ),
    kind=Kind.SALIENCE,
    intent="The linear game nearest to the real one, in a weighting of coalitions that makes it the Shapley value.",
    cost=COST,
    exact_cost=False,
    families=(
        Family.PERTURBATION,
        Family.LOCAL_SURROGATE,
        Family.ADDITIVE,
        Family.GAME,
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
        "Sampled, intervals of 1.96 standard errors hold the Shapley value in 91 to 96 of 100 draws: 0.92 at 12 pairs "
        "of coalitions for 6 players, 0.94 at 30, and 0.95 to 0.96 for 10 players at 20 pairs or more.",
        "Sampled, it is biased: a quotient of sample means, whose bias falls as 1 / budget, faster than its error.",
        "Equal to the Shapley value only where all coalitions are listed, as far as the budget pays for them.",
        "Nothing is added to the equations: a ridge, which other implementations add, moves every value towards 0.",
    ),
)


FEW = 16
"""Coalitions a player, from which on those drawn tell players apart but for freaks."""


@register(CARD)
@dataclass(frozen=True)
class KernelSHAP(SampledMethod):
    """argmin_φ Σ_S (n - 1) / (C(n, |S|) |S| (n - |S|)) · (v(S) - v(∅) - Σ_{i∈S} φ_i)², Σ φ = v(N) - v(∅).

    Lundberg and Lee 2017, theorem 2. The constraint is put into the equations, rather than given a large weight.
    Values are in units of the score. The parts are those of `Shapley`; standard errors of sampled values are those
    of regression with residuals of any spread, each as if left out of the fit (HC3; MacKinnon and White 1985). They do
    not see the bias, and are infinite where a coalition drawn once decides a value alone.

    Attributes:
        sampler: how coalitions are drawn where the budget does not pay for all: each with its complement or alone.
        budget, precision: as for `Shapley`.

    Raises:
        ConfigError: a budget of less than two coalitions a player, or coalitions that do not tell players apart;
            with the budget at which those drawn with this seed do.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x[:, 0] * x[:, 1] + x[:, 2], precision=torch.float64)
    >>> a = ap.KernelSHAP()(field, torch.tensor([[2.0, 3.0, 1.0]]))
    >>> [round(v, 9) for v in a.values[0].tolist()]
    [3.0, 3.0, 1.0]
    """

    sampler: KernelWeighted = KernelWeighted()

    def explain(self, q: Question) -> Attribution:
        game = self.game(q)
        drawn = torch.tensor([not self.sampler.listed(n, self.budget) for n in game.sizes.tolist()])
        unit = 2 if self.sampler.paired else 1
        budget = max(2, self.budget - self.budget % unit)
        if bool(drawn.any()):
            n = int(game.sizes[drawn].max())
            self.enough(min(2 * n, 2**n - 2), f"the equations of {n} players")
            if budget < FEW * n:
                self._tell_apart(game, drawn, budget, n)
        empty = game.value(torch.zeros(1, game.players, dtype=torch.bool))[:, 0]
        blocks = self.sampler.blocks(game, budget)
        found = estimated(blocks, LeastSquares(game, unit, empty, drawn), self.precision)
        return self.answer(
            q,
            game,
            found.values,
            standard_error=found.standard_error,
            claimed_total=q.fx - empty,
            parts=self.record(q, game, found),
        )

    def _tell_apart(self, game: Game, drawn: Tensor, budget: int, players: int) -> None:
        """See that the coalitions drawn will tell players apart, before any of them is evaluated.

        Raises:
            ConfigError: they will not, with the budget at which they do.
        """
        unit, nothing = 2 if self.sampler.paired else 1, game.question.fx * 0

        def told(count: int) -> bool:
            fit = LeastSquares(game, unit, nothing, drawn)
            for block in self.sampler.blocks(game, count):
                fit.add(block, nothing[:, None].expand(-1, block.size))
            return bool(fit.solvable.all())

        least = budget
        while not told(least):
            least += unit * max(1, least // (8 * unit))
        if least > budget:
            raise apart(budget, players, min(least, 2**players - 2))

    def passes(self, q: Question | None = None) -> Passes:
        return self.at_most(q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(budget=360),)
