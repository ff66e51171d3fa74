"""SmoothGrad."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Paper, Principle, Total
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.tree import Tree
from apportion.methods.gradient.gradient import Gradient
from apportion.methods.path.integrated_gradients import IntegratedGradients
from apportion.parts.copies import moments, moments_key, wrapped
from apportion.parts.noise import Gaussian
from apportion.parts.quadrature import Gauss

CARD = Card(
    title="SmoothGrad",
    paper=Paper(
        "Smilkov, Thorat, Kim, Viégas, Wattenberg",
        2017,
        "SmoothGrad: removing noise by adding noise",
        "arXiv:1706.03825",
    ),
    kind=None,
    intent="The mean of another method's map over noisy copies of the input.",
    cost="samples × base",
    families=(Family.MODIFIED_GRADIENT,),
    claims=(
        Claim(Principle.DECISION_RELEVANCE, holds=True, source="Deng et al. 2025, Table VI"),
        Claim(
            Principle.INPUT_ROBUSTNESS,
            holds=True,
            source="Deng et al. 2025, section IV-F, for bounded gradients",
        ),
        Claim(Principle.MODEL_ROBUSTNESS, holds=False, source="Deng et al. 2025, Table VI, as gradient-based"),
    ),
    measured={
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    total=Total.OF_BASE,
    differentiable=True,
    cautions=(
        "Noise leaves the data: many copies may have another top class; the target stays that of the example.",
        "The level of noise decides the picture; 0.15 of the range is a convention.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class SmoothGrad(Explainer):
    """The mean of the base's values over noisy copies; Smilkov et al. 2017, section 3.1.

    Target, baselines and further arguments are those of the example, not of its copies. Units and sign
    are the base's. `parts["standard_error"]` is the standard error of the mean; a single copy has none,
    and with `samples=1` the part is left out. Parts of the base that are one number per example, as FullGrad's shares
    of biases are, come as their means over copies; others do not.

    Attributes:
        base: any explainer.
        samples: copies per example.
        noise: how copies are made.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: 3 * x.sum(1))
    >>> ap.SmoothGrad(samples=4)(field, torch.tensor([[1.0, 2.0]])).values
    tensor([[3., 3.]])
    """

    _positive = ("samples",)

    base: Explainer = Gradient()
    samples: int = 25
    noise: Gaussian = Gaussian()

    def explain(self, q: Question) -> Attribution:
        found = moments(q, self.base, self.noise, self.samples, "SmoothGrad")
        parts: dict[str, Tree] = dict(found.parts)
        if self.samples > 1:  # the variance divides by the number of copies, hence one less here
            parts["standard_error"] = tree.apply(lambda v: (v / (self.samples - 1)).sqrt(), found.variance)
        return q.attribution(
            self,
            found.mean,
            domain=found.domain,
            groups=found.groups,
            claimed_total=found.claimed_total,
            parts=parts,
        )

    def asks(self, q: Question) -> Iterable[Hashable]:
        return (moments_key(self.base, self.noise, self.samples),)

    def passes(self, q: Question | None = None) -> Passes:
        return wrapped(self.base, self.samples, q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (
            cls(samples=5),
            cls(IntegratedGradients(quadrature=Gauss(8)), samples=3, noise=Gaussian(0.05)),
        )
