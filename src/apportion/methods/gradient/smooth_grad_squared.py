"""SmoothGrad squared."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Paper, Principle
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.methods.gradient.gradient import Gradient
from apportion.parts.copies import moments, moments_key, wrapped
from apportion.parts.noise import Gaussian

CARD = Card(
    title="SmoothGrad squared",
    paper=Paper(
        "Hooker, Erhan, Kindermans, Kim",
        2019,
        "A benchmark for interpretability methods in deep neural networks",
        "NeurIPS 2019, arXiv:1806.10758",
    ),
    kind=Kind.SENSITIVITY,
    intent="How large another method's values are around the input: their mean square over noisy copies.",
    cost="samples × base",
    families=(Family.MODIFIED_GRADIENT,),
    unjudged="of the statistics over noisy copies Deng et al. 2025 judge SmoothGrad, the mean, alone",
    measured={
        Principle.DUMMY: True,
        Principle.LINEARITY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    signed=False,
    differentiable=True,
    cautions=(
        "Has no sign: what lowers the score looks like what raises it.",
        "Squares sum to nothing, also where the base's values sum to the score.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class SmoothGradSquared(Explainer):
    """The mean square of the base's values over noisy copies; Hooker et al. 2019, section 4.2.

    Units are the base's, squared; never negative.

    Attributes:
        base: any explainer.
        samples: copies per example.
        noise: how copies are made.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: 3 * x.sum(1))
    >>> ap.SmoothGradSquared(samples=4)(field, torch.tensor([[1.0, 2.0]])).values
    tensor([[9., 9.]])
    """

    _positive = ("samples",)

    base: Explainer = Gradient()
    samples: int = 25
    noise: Gaussian = Gaussian()

    @property
    def unit(self) -> str:
        return f"({self.base.unit})²" if self.base.unit else ""

    def explain(self, q: Question) -> Attribution:
        found = moments(q, self.base, self.noise, self.samples, "SmoothGrad squared")
        values = tree.apply(lambda m, v: m.square() + v, found.mean, found.variance)
        return q.attribution(self, values, domain=found.domain, groups=found.groups)

    def asks(self, q: Question) -> Iterable[Hashable]:
        return (moments_key(self.base, self.noise, self.samples),)

    def passes(self, q: Question | None = None) -> Passes:
        return wrapped(self.base, self.samples, q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(samples=5),)
