"""VarGrad."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Paper, Principle
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.methods.gradient.gradient import Gradient
from apportion.parts.copies import moments, moments_key, wrapped
from apportion.parts.noise import Gaussian

CARD = Card(
    title="VarGrad",
    paper=Paper(
        "Adebayo, Gilmer, Goodfellow, Kim",
        2018,
        "Local explanation methods for deep neural networks lack sensitivity to parameter values",
        "ICLR 2018 workshop, arXiv:1810.03307",
    ),
    kind=Kind.SENSITIVITY,
    intent="How much another method's values change around the input: their variance over noisy copies.",
    cost="samples × base",
    families=(Family.MODIFIED_GRADIENT,),
    unjudged="of the statistics over noisy copies Deng et al. 2025 judge SmoothGrad, the mean, alone",
    measured={
        Principle.SENSITIVITY: False,
        Principle.DUMMY: True,
        Principle.LINEARITY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    signed=False,
    differentiable=True,
    cautions=(
        "Measures curvature, not slope (Seo et al. 2018): zero for a linear model, whatever its weights.",
        "Has no sign, and sums to nothing, whatever the base's values sum to.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class VarGrad(Explainer):
    """The variance (dividing by the number of copies) of the base's values over noisy copies.

    Adebayo et al. 2018, equation 2. Units are the base's, squared; never negative.

    Attributes:
        base: any explainer.
        samples: copies per example.
        noise: how copies are made.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: 3 * x.sum(1))
    >>> ap.VarGrad(samples=4)(field, torch.tensor([[1.0, 2.0]])).values
    tensor([[0., 0.]])
    """

    _positive = ("samples",)

    base: Explainer = Gradient()
    samples: int = 25
    noise: Gaussian = Gaussian()

    @property
    def unit(self) -> str:
        return f"({self.base.unit})²" if self.base.unit else ""

    def explain(self, q: Question) -> Attribution:
        found = moments(q, self.base, self.noise, self.samples, "VarGrad")
        return q.attribution(self, found.variance, domain=found.domain, groups=found.groups)

    def asks(self, q: Question) -> Iterable[Hashable]:
        return (moments_key(self.base, self.noise, self.samples),)

    def passes(self, q: Question | None = None) -> Passes:
        return wrapped(self.base, self.samples, q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(samples=5),)
