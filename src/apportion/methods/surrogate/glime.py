"""GLIME."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apportion.core.attribution import Groups
from apportion.core.card import Card, Kind, Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer
from apportion.core.registry import register
from apportion.methods.surrogate.lime import CLAIMS, FAMILIES, NOISY
from apportion.parts.masks.fills import SegmentMean
from apportion.parts.masks.samplers import Bernoulli, Sampler
from apportion.parts.masks.segments import QuickShift
from apportion.parts.surrogate.explainer import Fitted, Surrogate, by_kernel, fit
from apportion.parts.surrogate.kernels import Uniform
from apportion.parts.surrogate.neighborhoods import Local
from apportion.parts.surrogate.regressions import Regression, Ridge, Separate
from apportion.parts.surrogate.selections import Everything, Selection
from apportion.parts.surrogate.trust import Trust

CARD = Card(
    title="GLIME",
    paper=Paper("Tan, Tian, Li", 2023, "GLIME: general, stable and local LIME explanation", "NeurIPS"),
    kind=Kind.SALIENCE,
    intent="LIME without a kernel: samples are drawn near the example instead of weighed.",
    cost="as LIME",
    families=FAMILIES,
    claims=CLAIMS,
    measured=NOISY,
    exact_cost=False,
    cautions=(
        "A small σ removes almost nothing: at 0.25 each player leaves in one sample of nine million.",
        "Biased by its penalty. Without one (Ridge(0.0)) unbiased for additive scores alone; for others the bias falls "
        "as 1/N, as that of any regression on random samples.",
    ),
)


def kept_with(sigma: float) -> Bernoulli:
    """Give the sampler that keeps each player with probability 1 / (1 + exp(-1/σ²)); Tan et al. 2023.

    >>> [round(kept_with(s).p, 3) for s in (0.25, 0.5, 1.0)]
    [1.0, 0.982, 0.731]

    Raises:
        ConfigError: a width so small that nothing is ever removed.
    """
    if not sigma > 0 or (p := 1 / (1 + math.exp(-1 / sigma**2))) == 1:
        raise ConfigError(f"sigma={sigma!r}", "a width above 0.17", "0.5 removes one player in 56, 1.0 one in 4")
    return Bernoulli(p)


@register(CARD)
@dataclass(frozen=True)
class GLIME(Surrogate):
    """Coefficients b of min Σ (v(z) - b₀ - bᵀz)² + α |b|², each player kept with 1/(1+exp(-1/σ²)); Tan et al. 2023.

    In expectation that is LIME's fit with the kernel exp((|z| - d)/σ²) over all coalitions, from samples that all count
    alike. `parts` are those of `LIME`. `GLIME.near(sigma)` sets another width.

    Attributes:
        sampler: how near; σ = 1 unless given.
        with_x: put the example itself among the samples.
        regression: how b is found.
        selection: which features it may use.

    >>> import torch, apportion as ap
    >>> a = ap.GLIME(regression=ap.surrogates.Ridge(0.0), samples=64)(ap.Field(lambda x: x.sum(1)), torch.ones(1, 9))
    >>> a.values[0, :3].round(decimals=4), round(float(a.parts["held_out_r2"]), 4)
    (tensor([1., 1., 1.]), 1.0)
    """

    sampler: Sampler = kept_with(1.0)
    with_x: bool = False
    regression: Regression = Ridge()
    selection: Selection = Everything()

    @classmethod
    def near(cls, sigma: float, samples: int = 1000) -> GLIME:
        """Give GLIME of a width σ."""
        return cls(sampler=kept_with(sigma), samples=samples)

    @classmethod
    def for_images(cls, groups: Groups | None = None, *, samples: int = 1000) -> GLIME:
        """LIME's segments and fill for pictures, sampled near them.

        Args:
            groups: the players; quickshift segments unless given.
            samples: in a run.
        """
        return cls(groups=QuickShift() if groups is None else groups, fill=SegmentMean(), samples=samples)

    def fitted_to(self, local: Local, run: int) -> Fitted:
        drawn = local.draw(run, 0, self.samples)
        return fit(drawn, local, by_kernel(Uniform(), local), self.selection, self.regression)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        trust = Trust(reruns=1)
        return cls(samples=24, trust=trust), cls(samples=24, regression=Separate(), trust=trust)
