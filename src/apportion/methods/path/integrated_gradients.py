"""Integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle, Total
from apportion.core.errors import NonFiniteError
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.baselines import Baseline, Noise, Zero
from apportion.parts.quadrature import Gauss, Quadrature, Trapezoid

CARD = Card(
    title="Integrated gradients",
    paper=Paper(
        "Sundararajan, Taly, Yan",
        2017,
        "Axiomatic attribution for deep networks",
        "ICML 2017, arXiv:1703.01365",
    ),
    kind=Kind.SALIENCE,
    intent="The gradient averaged on the straight line from the baseline, times the difference from it.",
    cost="n k + k forward, n k backward (n nodes, k baselines)",
    families=(
        Family.GRADIENT_TIMES_INPUT,
        Family.MODIFIED_GRADIENT_TIMES_INPUT,
        Family.GAME,
        Family.PATH,
        Family.TAYLOR,
    ),
    claims=(
        Claim(Principle.ALLOCATION_FIDELITY, holds=True, source="Deng et al. 2025, Table VI"),
        Claim(Principle.MODEL_ROBUSTNESS, holds=False, source="Deng et al. 2025, Table VII"),
        Claim(Principle.COMPLETENESS, holds=True, source="Sundararajan et al. 2017, Proposition 1"),
        Claim(Principle.IMPLEMENTATION_INVARIANCE, holds=True, source="Sundararajan et al. 2017, section 3"),
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
    differentiable=True,
    cautions=(
        "Features equal to the baseline get 0 whatever they do; see references.equal_share.",
        "Complete in the limit only: read the gap, and raise n while it matters.",
        "The score at the baseline is part of the claim; see references.value.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class IntegratedGradients(Explainer):
    """(x - x') ⊙ ∫₀¹ ∂f(x' + α(x - x'))/∂x dα; Sundararajan et al. 2017, equation 1.

    Values are in units of the score. Several baselines are averaged, with each one's map in
    `parts["per_baseline"]` [B, k, ...].

    Attributes:
        baseline: the point x'.
        quadrature: nodes and weights of the integral over α.

    Raises:
        NonFiniteError: the gradient is infinite at a node, as at α = 0 for roots and logarithms; the
            rules without end points avoid that.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x.prod(1), precision=torch.float64)
    >>> a = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(4))(field, torch.tensor([[2.0, 3.0]]))
    >>> [round(v, 6) for v in a.values[0].tolist()], abs(float(a.gap)) < 1e-12
    ([3.0, 3.0], True)
    """

    baseline: Baseline = Zero()
    quadrature: Quadrature = Gauss(32)

    def explain(self, q: Question) -> Attribution:
        reference = q.references(self.baseline)
        nodes, weights = (t.to(q.device) for t in self.quadrature.rule())
        n, k = len(nodes), self.baseline.draws
        slope = tree.sums(q.x, len(q) * k)
        for step, owner in q.grid(n * k, "integrated gradients"):
            draw, node = step // n, step % n
            alpha = nodes[node]

            start = tree.apply(lambda r, at=(owner, draw): r[at], reference.rows)
            points = tree.apply(
                lambda s, x, t=alpha: torch.lerp(s, x, tree.per_row(t, s)), start, tree.index(q.x, owner)
            )
            try:
                _, grad = q.value_and_grad(points, owner)
            except NonFiniteError as error:
                if float(nodes.min()) > 0 and float(nodes.max()) < 1:
                    raise
                advice = "take a quadrature without nodes at the ends of the path (Gauss, Midpoint)"
                raise error.advising(advice) from error
            tree.add_rows(slope, owner * k + draw, grad, weights[node])
        each = tree.apply(lambda s, x, r: s.unflatten(0, (len(q), k)) * (x[:, None] - r), slope, q.x, reference.rows)
        each = tree.narrow(each, q.x)
        return q.attribution(
            self,
            tree.apply(lambda e: e.mean(1), each),
            claimed_total=q.fx - reference.value.mean(1),
            references=reference,
            parts={"per_baseline": each} if k > 1 else {},
        )

    def passes(self, q: Question | None = None) -> Passes:
        k = self.baseline.draws
        return self.baseline.added_to(Passes(self.quadrature.n * k, self.quadrature.n * k, at_x=1))

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(), cls(Noise(0.5, count=2), Trapezoid(9)))
