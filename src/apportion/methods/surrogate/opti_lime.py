"""OptiLIME."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.attribution import Groups
from apportion.core.card import Card, Kind, Paper, Principle
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer
from apportion.core.registry import register
from apportion.methods.surrogate.lime import CLAIMS, FAMILIES, NOISY
from apportion.parts.masks.fills import SegmentMean
from apportion.parts.masks.segments import QuickShift
from apportion.parts.surrogate.explainer import Fitted, Surrogate, fit
from apportion.parts.surrogate.kernels import Cosine, Distance, Euclid, exponential
from apportion.parts.surrogate.neighborhoods import Drawn, Local
from apportion.parts.surrogate.regressions import Centered, Regression, Ridge, factor_of
from apportion.parts.surrogate.selections import Best, Everything, Selection
from apportion.parts.surrogate.tables import Quartiles

CARD = Card(
    title="OptiLIME",
    paper=Paper(
        "Visani, Bagli, Chesani",
        2020,
        "OptiLIME: optimized LIME explanations for diagnostic computer algorithms",
        "arXiv:2006.05714",
    ),
    kind=Kind.SALIENCE,
    intent="LIME with the widest kernel under which a linear model still explains a wanted share of the score.",
    cost="as LIME; the widths are tried on the same samples",
    families=FAMILIES,
    claims=CLAIMS,
    measured={**NOISY, Principle.LINEARITY: False},
    exact_cost=False,
    cautions=(
        "The R² it aims at is that of the fit itself; the one on held-out samples is lower, and stands beside it.",
        "A narrow kernel explains few samples well: look at effective_samples.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class OptiLIME(Surrogate):
    """LIME at the kernel width that maximizes R² up to a target, and 2 target - R² beyond; Visani et al. 2020.

    The authors draw new samples for every width and search by Bayesian optimization (20 + 40 evaluations). Here all
    widths are tried on one set of samples, which costs no passes and makes the objective a smooth function: 20 widths
    between the ends, evenly in the logarithm, then four times 10 around the best; of equal ones the widest is taken.
    So the search draws nothing: samples fix the width, and a seed changes both through the samples alone.
    `parts` are those of `LIME`, with `kernel_width`.

    Attributes:
        distance: of samples from the example.
        narrowest: width to begin with, in units of the distance.
        widest: width to end with.
        per_root_feature: multiply both by the root of the number of features.
        tried: how many widths between the ends; half as many in each refinement.
        refinements: how often to look closer around the best.
        target: the R² aimed at.
        regression: how the coefficients are found, at the width chosen.
        selection: which features it may use.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x.prod(1))
    >>> a = ap.OptiLIME(samples=200)(field, torch.ones(1, 3, dtype=torch.float64))
    >>> round(float(a.parts["r2"]), 2)
    0.9
    """

    _positive = ("samples", "narrowest", "widest", "target")
    _not_negative = ("refinements",)

    distance: Distance = Cosine()
    narrowest: float = 0.05
    widest: float = 5.0
    per_root_feature: bool = False
    tried: int = 20
    refinements: int = 4
    target: float = 0.9
    regression: Regression = Ridge(0.0)
    selection: Selection = Everything()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tried < 2 or self.narrowest > self.widest:
            raise ConfigError(
                f"OptiLIME(tried={self.tried}, narrowest={self.narrowest:g}, widest={self.widest:g})",
                "two widths or more, the narrowest first",
                "take the defaults, or others in order",
            )

    def fitted_to(self, local: Local, run: int) -> Fitted:
        drawn = local.draw(run, 0, self.samples)
        width = self.searched(drawn, local)

        def weigh(z: Tensor) -> Tensor:
            return exponential(self.distance(z, local.center), width)

        return fit(drawn, local, weigh, self.selection, self.regression, kernel_width=width)

    def searched(self, drawn: Drawn, local: Local) -> Float[Tensor, " B"]:
        """Find the width of each example."""
        far = self.distance(drawn.z, local.center)
        scale = local.present.sum(-1).double().sqrt() if self.per_root_feature else torch.ones_like(far[:, 0])
        low, high = (scale * end for end in (self.narrowest, self.widest))
        best, height = high, torch.full_like(high, -float("inf"))
        for count in (self.tried, *(max(2, self.tried // 2),) * self.refinements):
            steps = torch.linspace(1, 0, count, dtype=far.dtype, device=far.device)
            ratio = high / low
            for s in steps:  # from the widest, which is kept where others are no better
                width = low * ratio**s
                found = self.objective(drawn, local, exponential(far, width) * drawn.w)
                better = found > height + 1e-9
                best, height = torch.where(better, width, best), torch.where(better, found, height)
            around = ratio ** (1 / (count - 1))
            low = torch.maximum(best / around, scale * self.narrowest)
            high = torch.minimum(best * around, scale * self.widest)
        return best

    def objective(self, drawn: Drawn, local: Local, w: Tensor) -> Float[Tensor, " B"]:
        """Give R², folded down beyond the target; minus infinity where the samples determine no model."""
        kept = self.selection(drawn.z, drawn.v, w, local.present, local.center)
        c = Centered.of(drawn.z, drawn.v, w, kept)
        lower, determined = factor_of(c.gram, 0.0, kept)
        lower = torch.where(determined[:, None, None], lower, torch.eye(lower.shape[-1]).to(lower))
        b = torch.cholesky_solve(c.cross[..., None], lower).squeeze(-1)
        r2 = c.fit(b, b).r2
        folded = torch.where(r2 <= self.target, r2, 2 * self.target - r2)
        return torch.where(determined & torch.isfinite(r2), folded, -float("inf"))

    @classmethod
    def for_images(cls, groups: Groups | None = None, *, samples: int = 1000) -> OptiLIME:
        """LIME's segments and fill for pictures, with a width for each of them.

        Args:
            groups: the players; quickshift segments unless given.
            samples: in a run.
        """
        return cls(groups=QuickShift() if groups is None else groups, fill=SegmentMean(), samples=samples)

    @classmethod
    def for_tables(
        cls, data: Tensor, categorical: Sequence[int] = (), *, samples: int = 5000, most: int = 10
    ) -> OptiLIME:
        """Give the settings for tables: quartiles of data, Euclid's distance, widths by the root of the columns."""
        return cls(
            rows=Quartiles.fit(data, categorical), distance=Euclid(), narrowest=0.1, per_root_feature=True,
            samples=samples, selection=Best(most),
        )  # fmt: skip

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        quick = cls(samples=24, tried=4, refinements=1, regression=Ridge(1.0), selection=Best(3))
        return (quick,)
