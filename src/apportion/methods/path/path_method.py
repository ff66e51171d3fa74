"""Any path with any accumulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apportion.core.card import Card, Family, Kind, Paper, Total
from apportion.core.explainer import Explainer
from apportion.parts.accumulate import Accumulator, Dot, ImportantDirection, ValidFeatures
from apportion.parts.baselines import Noise
from apportion.parts.paths.explainer import PathExplainer
from apportion.parts.paths.path import Path
from apportion.parts.paths.straight import Straight
from apportion.parts.quadrature import Adaptive, Midpoint


@dataclass(frozen=True)
class PathMethod(PathExplainer):
    """What an accumulator makes of a path: the methods of the literature that have no name yet.

    It stands in no table of methods, being all of them: its Card says what holds whatever the parts are. Values
    claim f(x) - f(x') unless the accumulator makes something else of it, as `Split` does. Whether their signs mean
    anything is the accumulator's matter, too: those of `ImportantDirection` do not. Units are those of the
    score.

    Attributes:
        path: one of `ap.paths`; `ap.paths.Along` takes a curve of your own.
        accumulator: one of `ap.accumulate`.

    Raises:
        ConfigError: a path and an accumulator that do not go together; the message says what does.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x.prod(1), precision=torch.float64)
    >>> bent = ap.paths.Along(lambda x, start, t: start + (x - start) * torch.cat([t, t**2], 1))
    >>> a = ap.PathMethod(bent, ap.accumulate.Dot())(field, torch.tensor([[2.0, 3.0]]))
    >>> [round(v, 2) for v in a.values[0].tolist()]
    [2.0, 4.0]
    """

    card: ClassVar[Card] = Card(
        title="Path method",
        paper=Paper(
            "Sundararajan, Taly, Yan",
            2017,
            "Axiomatic attribution for deep networks",
            "ICML 2017, arXiv:1703.01365",
        ),
        kind=Kind.SALIENCE,
        intent="Gradients on any path to the example, added up in any way.",
        cost="as many as the path and the accumulator take",
        exact_cost=False,
        families=(Family.PATH,),
        total=Total.DIFFERENCE,
        signed=False,
        cautions=(
            "What may be said of the values depends on path and accumulator: nothing was measured of all of them.",
        ),
    )

    path: Path = Straight()
    accumulator: Accumulator = Dot()  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    @property
    def way(self) -> Path:
        return self.path

    @property
    def claims(self) -> bool:
        return self.accumulator.claims

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (
            cls(),
            cls(Straight(Noise(0.5, count=2), quadrature=Midpoint(8)), ValidFeatures()),
            cls(Straight(quadrature=Adaptive(max_passes=16)), ImportantDirection()),
        )
