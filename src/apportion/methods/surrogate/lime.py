"""LIME."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from apportion.core.attribution import Groups
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle
from apportion.core.explainer import Explainer
from apportion.core.registry import register
from apportion.parts.masks.fills import Baselines, Fill, SegmentMean
from apportion.parts.masks.groups import RealTokens
from apportion.parts.masks.samplers import UniformSizes
from apportion.parts.masks.segments import QuickShift
from apportion.parts.surrogate.explainer import Fitted, Surrogate, by_kernel, fit
from apportion.parts.surrogate.kernels import Euclid, Exponential, Kernel
from apportion.parts.surrogate.neighborhoods import Local
from apportion.parts.surrogate.regressions import Regression, Ridge
from apportion.parts.surrogate.selections import Best, Everything, Selection
from apportion.parts.surrogate.tables import Quartiles, table_rows
from apportion.parts.surrogate.trust import Trust

CLAIMS = (
    Claim(Principle.LOCAL_ACCURACY, holds=False, source="Deng et al. 2025, Table VII, as axiomatic fidelity"),
    Claim(Principle.MISSINGNESS, holds=False, source="Deng et al. 2025, Table VII, as axiomatic fidelity"),
    Claim(Principle.CONSISTENCY, holds=False, source="Deng et al. 2025, Table VII, as axiomatic fidelity"),
)
"""What the survey says of LIME and its variants alike."""

FAMILIES = (Family.LOCAL_SURROGATE, Family.ADDITIVE, Family.REMOVAL)

NOISY = {
    Principle.COMPLETENESS: False,
    Principle.DUMMY: False,
    Principle.SYMMETRY: False,
    Principle.LINEARITY: True,
    Principle.IMPLEMENTATION_INVARIANCE: True,
}
"""What holds of regressions on random samples that keep every feature."""

CARD = Card(
    title="LIME",
    paper=Paper(
        "Ribeiro, Singh, Guestrin",
        2016,
        "“Why should I trust you?” Explaining the predictions of any classifier",
        "KDD, arXiv:1602.04938",
    ),
    kind=Kind.SALIENCE,
    intent="The weights of a linear model of the score, fitted to samples in which players are removed.",
    cost="at most N k (1 + r) forward and the fill's own (N samples, k draws of the fill, r re-runs to judge it)",
    families=FAMILIES,
    claims=CLAIMS,
    measured=NOISY,
    exact_cost=False,
    cautions=(
        "Biased by its penalty: with α = 1 coefficients are drawn to 0, the more the fewer samples weigh.",
        "Random: other seeds give other maps; the stability indices say how much.",
        "Fitted to coalitions far from the example, too; below a held-out R² of a half it is no model of the score.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class LIME(Surrogate):
    """Coefficients b of min Σ π(z) (v(z) - b₀ - bᵀz)² + α |b|² over sampled coalitions z; Ribeiro et al. 2016.

    The paper's equation penalizes the number of features; its code, and this, adds an intercept and a ridge, after a
    selection of features where one is asked for. Units are those of the score (for `NormalRows`, score per standard
    deviation). `parts` has `intercept`, `r2` on the samples of the fit, `held_out_r2` with its 95 per cent interval
    on the coalitions of re-runs that are not in the fit, `held_out` of them different ones (not a number where these
    are fewer than ten, as with few players; absent where every run has the same samples, as under `AllSubsets`: a
    warning says so, and gives the `r2` of the fit), `standard_error` for the sampling alone, the indices `csi` and
    `vsi` (not a number for a constant score), and `effective_samples`, (Σπ)² / Σπ². What a sampler weighs is scaled
    to 1 on average, the weight of the example itself.

    Attributes:
        kernel: π, the weight of a sample.
        regression: how b is found.
        selection: which features it may use.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x @ torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))
    >>> exact = ap.LIME(regression=ap.surrogates.Ridge(0.0), samples=50)
    >>> exact(field, torch.ones(1, 3, dtype=torch.float64)).values
    tensor([[1.0000, 2.0000, 3.0000]], dtype=torch.float64)
    """

    kernel: Kernel = Exponential(0.25)
    regression: Regression = Ridge()
    selection: Selection = Everything()

    def fitted_to(self, local: Local, run: int) -> Fitted:
        drawn = local.draw(run, 0, self.samples)
        return fit(drawn, local, by_kernel(self.kernel, local), self.selection, self.regression)

    @classmethod
    def for_images(cls, groups: Groups | None = None, *, samples: int = 1000) -> LIME:
        """Give the authors' settings for pictures: of the segments any half is replaced by their mean colors.

        Args:
            groups: the players; quickshift segments unless given.
            samples: in a run.
        """
        return cls(groups=QuickShift() if groups is None else groups, fill=SegmentMean(), samples=samples)

    @classmethod
    def for_text(
        cls, fill: Fill | None = None, groups: Groups | None = None, *, samples: int = 5000, most: int = 10
    ) -> LIME:
        """Give the authors' settings for text, at the embedding: any number of tokens is removed, from one to all.

        Args:
            fill: what stands for a removed token, such as `ap.fills.MaskToken`; zeros unless given.
            groups: the players, such as `ap.groups.Words`; every token unless given.
            samples: in a run.
            most: players that get a coefficient.
        """
        return cls(
            groups=RealTokens() if groups is None else groups,
            fill=Baselines() if fill is None else fill,
            sampler=UniformSizes(),
            samples=samples,
            selection=Best(most),
        )

    @classmethod
    def for_tables(
        cls,
        data: Tensor,
        categorical: Sequence[int] = (),
        *,
        continuous: bool = False,
        around_x: bool = False,
        samples: int = 5000,
        most: int = 10,
    ) -> LIME:
        """Give the authors' settings for tables.

        Args:
            data: rows [n, columns].
            categorical: columns whose values are categories.
            continuous: regress on the columns themselves, standardized, instead of on their quartiles.
            around_x: with `continuous`, sample around the example; the authors sample around the data's mean.
            samples: in a run.
            most: columns that get a coefficient.
        """
        rows = table_rows(data, categorical, continuous, around_x)
        kernel = Exponential(0.75, Euclid(), per_root_feature=True)
        return cls(rows=rows, kernel=kernel, samples=samples, selection=Best(most))

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (
            cls(samples=24, trust=Trust(reruns=1)),
            cls(rows=Quartiles(), kernel=Exponential(0.75, Euclid(), per_root_feature=True), samples=24),
        )
