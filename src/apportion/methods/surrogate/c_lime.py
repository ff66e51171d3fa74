"""C-LIME."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.noise import Gaussian
from apportion.parts.surrogate.explainer import Fitted, LocalFit, by_kernel, fit
from apportion.parts.surrogate.kernels import Uniform
from apportion.parts.surrogate.neighborhoods import Cloud, Local
from apportion.parts.surrogate.regressions import Regression, Ridge, Separate
from apportion.parts.surrogate.selections import Everything
from apportion.parts.surrogate.trust import Trust

CARD = Card(
    title="C-LIME",
    paper=Paper(
        "Agarwal, Jabbari, Agarwal, Upadhyay, Wu, Lakkaraju",
        2021,
        "Towards the unification and robustness of perturbation and gradient based explanations",
        "ICML, arXiv:2102.10618",
    ),
    kind=Kind.SENSITIVITY,
    intent="The slopes of a linear model of the score, fitted to Gaussian samples around the example.",
    cost="N (1 + r) forward (N samples, r re-runs that judge the fit)",
    families=(Family.LOCAL_SURROGATE,),
    claims=(
        Claim(Principle.INPUT_ROBUSTNESS, holds=True, source="Deng et al. 2025, section IV-F, for bounded gradients"),
    ),
    unjudged="Deng et al. 2025 judge the faithfulness of surrogates of masks; this one is of Gaussian samples",
    measured={
        Principle.DUMMY: False,
        Principle.SYMMETRY: False,
        Principle.LINEARITY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: True,
    },
    cautions=("Estimates SmoothGrad of the gradient without gradients, with far more noise from as many passes.",),
)


@register(CARD)
@dataclass(frozen=True)
class CLIME(LocalFit):
    """Slopes of a linear model of f(x + s n) over Gaussian n: Cov(f, s n) / s²; Agarwal et al. 2021.

    The expectation is that of SmoothGrad, E ∇f(x + s n), by Stein's identity, and the score need not be
    differentiable. Elements of the noise are independent, so that each is regressed alone, in any number; where samples
    outnumber elements, `Ridge(0.0)` fits all at once and is exact for linear scores. Values are in units of the score
    per unit of input; `parts` are those of `LIME`.

    Attributes:
        samples: N.
        trust: further runs, to judge the fit.
        noise: its width s.
        regression: how b is found.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x[:, 0] ** 2)
    >>> a = ap.CLIME(noise=ap.noise.Gaussian(0.3, relative=False))(field, torch.tensor([[1.5]], dtype=torch.float64))
    >>> bool((a.values - 3).abs() < 4 * a.parts["standard_error"])
    True
    """

    noise: Gaussian = Gaussian()
    regression: Regression = Separate()

    def around(self, q: Question) -> Local:
        return Cloud(self.noise).around(q)

    def fitted_to(self, local: Local, run: int) -> Fitted:
        drawn = local.draw(run, 0, self.samples)
        return fit(drawn, local, by_kernel(Uniform(), local), Everything(), self.regression)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes((1 + self.trust.reruns) * self.samples, 0, at_x=1)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        trust = Trust(reruns=1)
        return cls(samples=24, regression=Ridge(0.01), trust=trust), cls(samples=24, trust=trust)
