"""KernelSHAP."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle, Total
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.masks.estimators import LeastSquares, estimated
from apportion.parts.masks.sampled import SampledMethod
from apportion.parts.masks.samplers import KernelWeighted

CARD = Card(
    title="KernelSHAP",
    paper=Paper(
        "Lundberg, Lee", 2017, "A unified approach to interpreting model predictions", "NeurIPS 2017, arXiv:1705.07874"
    ),
    kind=Kind.SALIENCE,
    intent="The linear game nearest to the real one, in a weighting of coalitions that makes it the Shapley value.",
    cost="at most budget + 1 forward, for each draw of the fill; all 2^n coalitions where the budget pays for them",
    exact_cost=False,
    families=(
        Family.PERTURBATION,
        Family.LOCAL_SURROGATE,
        Family.ADDITIVE,
        Family.GAME,
        Family.REMOVAL,
        Family.TAYLOR,
    ),
    claims=(
        Claim(Principle.LOCAL_ACCURACY, holds=True, source="Deng et al. 2025, Table VI, as Shapley values"),
        Claim(Principle.MISSINGNESS, holds=True, source="Deng et al. 2025, Table VI, as Shapley values"),
        Claim(Principle.CONSISTENCY, holds=True, source="Deng et al. 2025, Table VI, as Shapley values"),
        Claim(Principle.ALLOCATION_FIDELITY, holds=True, source="Deng et al. 2025, Table VI, as Shapley values"),
    ),
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
        "Sampled, it is biased: a quotient of sample means, whose bias falls as 1 / budget, faster than its error.",
        "Equal to the Shapley value only where all coalitions are listed, as far as the budget pays for them.",
        "Nothing is added to the equations: a ridge, which other implementations add, moves every value towards 0.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class KernelSHAP(SampledMethod):
    """argmin_φ Σ_S (n - 1) / (C(n, |S|) |S| (n - |S|)) · (v(S) - v(∅) - Σ_{i∈S} φ_i)², Σ φ = v(N) - v(∅).

    Lundberg and Lee 2017, theorem 2. The constraint is put into the equations, rather than given a large weight.
    Values are in units of the score. The parts are those of `Shapley`; standard errors of sampled values are those
    of regression with residuals of any spread (White 1980), and do not see the bias.

    Attributes:
        sampler: how coalitions are drawn where the budget does not pay for all: each with its complement or alone.
        budget, precision: as for `Shapley`.

    Raises:
        ConfigError: a budget of less than two coalitions a player, or coalitions that do not tell players apart.

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
        if bool(drawn.any()):
            n = int(game.sizes[drawn].max())
            self.enough(2 * n, f"the equations of {n} players")
        empty = game.value(torch.zeros(1, game.players, dtype=torch.bool))[:, 0]
        blocks = self.sampler.blocks(game, self.budget - self.budget % unit)
        found = estimated(blocks, LeastSquares(game, unit, empty, drawn), self.precision)
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
        return (cls(budget=360),)
