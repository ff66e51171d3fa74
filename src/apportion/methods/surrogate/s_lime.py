"""S-LIME."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.attribution import Groups
from apportion.core.card import Card, Kind, Paper, Principle
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.methods.surrogate.lime import CLAIMS, FAMILIES, NOISY
from apportion.parts.masks.fills import SegmentMean
from apportion.parts.masks.segments import QuickShift
from apportion.parts.surrogate.explainer import Fitted, Surrogate, by_kernel
from apportion.parts.surrogate.kernels import Euclid, Exponential, Kernel
from apportion.parts.surrogate.lars import lars
from apportion.parts.surrogate.neighborhoods import Drawn, Local
from apportion.parts.surrogate.regressions import Regression, Ridge
from apportion.parts.surrogate.tables import table_rows
from apportion.parts.surrogate.trust import Trust

CARD = Card(
    title="S-LIME",
    paper=Paper("Zhou, Hooker, Wang", 2021, "S-LIME: stabilized-LIME for model explanation", "KDD, arXiv:2106.07875"),
    kind=Kind.SALIENCE,
    intent="LIME that draws samples until a test says which features come first.",
    cost="at most M k (1 + r) forward and the fill's own (M the most samples, k draws of the fill, r re-runs)",
    families=FAMILIES,
    claims=CLAIMS,
    measured={**NOISY, Principle.LINEARITY: False},
    exact_cost=False,
    cautions=(
        "Stable is which features come first, not their coefficients, and not that a linear model fits.",
        "Two features that matter alike are never told apart: the most samples are spent on them.",
        "The tests, one for each feature chosen, are not corrected for being several.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class SLIME(Surrogate):
    """LIME on the first features of a LARS path, each ahead of the next by a test; Zhou et al. 2021.

    Whenever the lead of the feature that joins the path over the runner-up is not significant, the samples are doubled,
    up to `most`. What is left is a ridge on the features chosen. `parts` are those of `LIME`, with `samples_used`, the
    least sure p-value (`p_value`) and whether every lead was significant (`settled`, 1 or 0).

    Attributes:
        samples: to begin with; the authors' 1000 and most=10_000 are those of `for_tables`.
        most: samples at most.
        count: features chosen.
        level: of each test.
        tolerance: a lead below, in standard deviations of the score, draws no more samples: the two features matter
            alike; unless the test says otherwise they stay unsettled.
        kernel: the weight of a sample.
        regression: how coefficients are found.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x @ torch.tensor([1.0, 5.0, 0.0, 3.0], dtype=x.dtype))
    >>> a = ap.SLIME(count=2, samples=200)(field, torch.ones(1, 4, dtype=torch.float64))
    >>> a.values.nonzero()[:, 1].tolist()
    [1, 3]
    """

    _positive = ("samples", "most", "count", "level")
    _not_negative = ("tolerance",)

    samples: int = 250
    most: int = 1000
    count: int = 5
    level: float = 0.05
    tolerance: float = 1e-3
    kernel: Kernel = Exponential(0.25)
    regression: Regression = Ridge()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < self.samples:
            raise ConfigError(
                f"SLIME(samples={self.samples}, most={self.most})", "most of at least samples", "raise most"
            )
        if not self.sampler.begins_alike:
            raise ConfigError(
                f"SLIME(sampler={type(self.sampler).__name__}()), which adds samples to those it has",
                "a sampler whose coalitions, and their weights, are the same at the beginning of a larger budget",
                "use ap.samplers.Bernoulli(), UniformSizes() or AllSubsets(), or ap.LIME, which draws once",
            )

    def fitted_to(self, local: Local, run: int) -> Fitted:
        batch = len(local.present)
        active = torch.ones(batch, dtype=torch.bool, device=local.present.device)
        drawn = local.draw(run, 0, self.samples)
        weigh = by_kernel(self.kernel, local)
        kept, sure, open_ = self.chosen(drawn, weigh(drawn.z), local, active)
        while bool(active.any()) and (have := drawn.v.shape[1]) < self.most:
            active = open_
            if not bool(active.any()):
                break
            more = local.draw(run, have, min(have, self.most - have), active)
            if more.v.shape[1] == 0:  # all coalitions are played
                break
            drawn = Drawn(*(torch.cat(pair, 1) for pair in zip(drawn, more, strict=True)))
            new, p, more_open = self.chosen(drawn, weigh(drawn.z), local, active)
            kept = torch.where(active[:, None], new, kept)
            sure = torch.where(active, p, sure)
            open_ = active & more_open
        w = weigh(drawn.z) * drawn.w
        parts = {
            "samples_used": (drawn.w > 0).sum(1).double(),
            "p_value": sure,
            "settled": (sure <= self.level).double(),
        }
        return Fitted(self.regression(drawn.z, drawn.v, w, kept), kept, weigh, drawn, parts)

    def chosen(
        self, drawn: Drawn, weight: Tensor, local: Local, active: Bool[Tensor, " B"]
    ) -> tuple[Bool[Tensor, "B P"], Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Walk the path: its features, the least sure p-value, whether samples may settle it; others' are void."""
        path = lars(drawn, weight * drawn.w, local.present & active[:, None], self.count)
        alike = path.lead <= self.tolerance
        few = (drawn.w > 0).sum(1) < 2  # no test
        unsure = torch.where(alike, 0, path.p_value).amax(-1) > self.level
        return path.kept, torch.where(few, 1, path.p_value.amax(-1)), unsure | few

    def passes(self, q: Question | None = None) -> Passes:
        made = self.passes_for(self.most, q)
        return made._replace(exact=False)

    @classmethod
    def for_images(cls, groups: Groups | None = None, *, samples: int = 1000) -> SLIME:
        """LIME's segments and fill for pictures, and as many samples as the authors allow for tables.

        Args:
            groups: the players; quickshift segments unless given.
            samples: to begin with, ten times as many at most.
        """
        players = QuickShift() if groups is None else groups
        return cls(groups=players, fill=SegmentMean(), samples=samples, most=10 * samples)

    @classmethod
    def for_tables(
        cls, data: Tensor, categorical: Sequence[int] = (), *, continuous: bool = False, around_x: bool = False
    ) -> SLIME:
        """Give the settings for tables, where the authors tried it; as `LIME.for_tables`."""
        rows = table_rows(data, categorical, continuous, around_x)
        kernel = Exponential(0.75, Euclid(), per_root_feature=True)
        return cls(rows=rows, kernel=kernel, samples=1000, most=10_000)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(samples=16, most=40, count=3, trust=Trust(reruns=1)),)
