"""Gradient × input."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle, Total
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.sharing import AtX
from apportion.parts.baselines import Baseline, Zero

CARD = Card(
    title="Gradient × input",
    paper=Paper(
        "Shrikumar, Greenside, Shcherbina, Kundaje",
        2016,
        "Not just a black box: learning important features through propagating activation differences",
        "arXiv:1605.01713",
    ),
    kind=Kind.SALIENCE,
    intent="The first-order share of each feature in the score's difference from the baseline.",
    cost="1 + k forward, 1 backward (k baselines)",
    families=(Family.GRADIENT_TIMES_INPUT, Family.MODIFIED_GRADIENT_TIMES_INPUT, Family.TAYLOR),
    claims=(
        Claim(Principle.ALLOCATION_FIDELITY, holds=False, source="Deng et al. 2025, Table VII"),
        Claim(Principle.MODEL_ROBUSTNESS, holds=False, source="Deng et al. 2025, Table VI, as gradient-based"),
    ),
    measured={
        Principle.COMPLETENESS: False,
        Principle.SENSITIVITY: False,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: False,
    },
    total=Total.DIFFERENCE,
    differentiable=True,
    cautions=(
        "Exact for linear models only; the gap says how far off it is elsewhere.",
        "Depends on where the zero of the input lies: a shift of the input that the first layer undoes changes it.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class GradientTimesInput(Explainer):
    """(x - x') ⊙ ∂f/∂x, the first-order Taylor terms; Ancona et al. 2019, equation 6, for x' = 0.

    Values are in units of the score. Several baselines are averaged.

    Attributes:
        baseline: the point x'.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x @ torch.tensor([1.05, 1.50], dtype=torch.float64))
    >>> a = ap.GradientTimesInput()(field, torch.tensor([[100_000, 10_000]], dtype=torch.float64))
    >>> a.values.tolist(), a.claimed_total.tolist()
    ([[105000.0, 15000.0]], [120000.0])
    """

    baseline: Baseline = Zero()

    def explain(self, q: Question) -> Attribution:
        value, grad = q.value_and_grad(q.x, q.owners)
        reference = q.references(self.baseline)
        values = tree.apply(lambda g, x, r: g * (x - r.mean(1)), grad, q.x, reference.rows)
        total = value - reference.value.mean(1)
        return q.attribution(self, values, value=value, claimed_total=total, references=reference)

    def asks(self, q: Question) -> Iterable[Hashable]:
        return (AtX(), ("references", self.baseline), ("once", self.baseline))

    def passes(self, q: Question | None = None) -> Passes:
        return self.baseline.added_to(Passes(1, 1))
