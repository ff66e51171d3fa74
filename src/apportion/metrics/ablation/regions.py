"""Region perturbation: regions replaced from the most or the least relevant on, and what is made of both curves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.question import Question
from apportion.metrics.ablation.curves import Counts, Stepwise, drawn, height, new
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import players
from apportion.metrics.scores import Curve, Direction
from apportion.parts.baselines import NetworkZero, UniformNoise
from apportion.parts.masks.fills import Baselines, Fill
from apportion.parts.masks.groups import Squares

_PAPER = Paper(
    "Samek, Binder, Montavon, Lapuschkin, Müller",
    2017,
    "Evaluating the visualization of what a deep neural network has learned",
    "IEEE TNNLS",
)
_COST = "1 row a region, and 1; twice the regions for both orders"
_OFF = "Noise in the place of regions takes pictures away from the data; judge a random map beside."


@dataclass(frozen=True)
class RegionPerturbation(Stepwise):
    """Base of the metrics of Samek et al. (2017): 9 × 9 pixels at a time, to uniform noise, a hundred times.

    Attributes:
        groups: the regions; squares of 9 × 9 pixels of pictures, else single elements, unless given.
        fill: what they are replaced with; noise needs `Field(bounds=...)`.
        score: what is watched, at every point of the curve.
        step: regions at a time; one unless given.
        limit: L, the regions that go at most; None for all.
    """

    fill: Fill = Baselines(UniformNoise())
    limit: int | None = 100

    def players(self, q: Question) -> Groups:
        """Choose the regions."""
        if self.groups is None and isinstance(q.x, Tensor) and q.x.ndim == 4:
            return Squares(9)
        return players(q, self.groups)

    def stride(self, q: Question) -> int:
        """Take one at a time unless told."""
        return self.step or 1

    @abstractmethod
    def orders(self) -> tuple[bool, ...]:
        """Say which curves are needed: false for the highest first, true for the lowest."""

    @abstractmethod
    def combined(self, *heights: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Make one number of the score at x and of each curve's mean height."""

    def counts(self, q: Question) -> tuple[Counts, bool]:
        """Lay out the points."""
        return self.until(q), self.orders()[0]

    def asked(self, q: Question) -> Iterable[tuple[Counts, bool]]:
        """Name the points of both curves."""
        return [(self.until(q), lowest) for lowest in self.orders()]

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Remove region by region."""
        removals, gone = self.removals(q, subject), self.until(q)
        curves: dict[str, Curve] = {}
        heights = []
        for lowest in self.orders():
            y = removals(gone, lowest)
            name, first = ("LeRF", "lowest") if lowest else ("MoRF", "highest")
            heights.append(height(gone, y))
            y, what = y.masked_fill(~new(gone, y), torch.nan), f"share of players removed, {first} first"
            curves[name] = drawn(removals.share(gone, y), y, what, self.score)
        at_x = tree.wide(removals(gone[:, :1])[:, 0])  # known by now
        return Found(self.combined(at_x, *heights), curves, {"ties": removals.ties})

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give small squares to black, and pixels to noise up to a limit."""
        noise = Baselines(UniformNoise(0.0, 1.0))
        return cls(groups=Squares(2), fill=Baselines(NetworkZero()), limit=None), cls(
            Squares(1), noise, step=3, limit=9
        )


@register(
    MetricCard(
        title="Most relevant first",
        paper=_PAPER,
        intent="The mean height of the score's curve while regions are replaced, the most relevant first.",
        direction=Direction.LOWER,
        chance="that of a random order",
        cost=_COST,
        cautions=(_OFF,),
    )
)
@dataclass(frozen=True)
class MoRF(RegionPerturbation):
    """The mean of f(x^(k)) over k = 0..L, the regions of the highest summed values replaced first; low is good.

    x^(0) is x itself. With a region a pixel, `limit=None` and one substrate it is `DeletionAUC` but for the weights of
    the two ends, which count half there.

    Attributes:
        groups: as of `RegionPerturbation`, like all options.

    Source: Samek et al. (2017).

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0]])
    >>> MoRF(fill=ap.fills.Baselines(ap.baselines.Zero()), score=ap.Logit())(field, x, x).curves["MoRF"].y
    tensor([[3., 1., 0.]])
    """

    def orders(self) -> tuple[bool, ...]:
        return (False,)

    def combined(self, *heights: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return heights[1]


@register(
    MetricCard(
        title="Least relevant first",
        paper=_PAPER,
        intent="The mean height of the score's curve while regions are replaced, the least relevant first.",
        direction=Direction.HIGHER,
        chance="that of a random order",
        cost=_COST,
        cautions=(_OFF, "Regions that speak against the class go first: the score may rise above that at x."),
    )
)
@dataclass(frozen=True)
class LeRF(RegionPerturbation):
    """The mean of f(x^(k)) over k = 0..L where the regions of the lowest summed values are replaced first.

    Attributes:
        groups: the regions, and so on as for `MoRF`.

    Source: Samek et al. (2017).

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0]])
    >>> LeRF(fill=ap.fills.Baselines(ap.baselines.Zero()), score=ap.Logit())(field, x, x).curves["LeRF"].y
    tensor([[3., 2., 0.]])
    """

    def orders(self) -> tuple[bool, ...]:
        return (True,)

    def combined(self, *heights: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return heights[1]


@register(
    MetricCard(
        title="AOPC",
        paper=_PAPER,
        intent="How far the score falls on average while the most relevant regions are replaced.",
        direction=Direction.HIGHER,
        chance="that of a random order, which is above 0 where any loss of regions lowers the score",
        cost=_COST,
        cautions=(_OFF, "It grows with the score at x, and its number depends on L: compare at one L only."),
    )
)
@dataclass(frozen=True)
class AOPC(RegionPerturbation):
    """The area over the perturbation curve: 1/(L+1) Σ_{k=0..L} [f(x^(0)) - f(x^(k))], most relevant first.

    Attributes:
        groups: the regions; other options too are those of `RegionPerturbation`.

    Source: Samek et al. (2017), where it is averaged over a data set.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0, 3.0]])
    >>> AOPC(fill=ap.fills.Baselines(ap.baselines.Zero()), score=ap.Logit())(field, x, x).values.item()
    3.5
    """

    def orders(self) -> tuple[bool, ...]:
        return (False,)

    def combined(self, *heights: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        at_x, morf = heights
        return at_x - morf


@register(
    MetricCard(
        title="ABPC",
        paper=_PAPER,
        intent="How far apart the curves for the least and the most relevant regions are on average.",
        direction=Direction.HIGHER,
        chance="0",
        cost=_COST,
        cautions=(_OFF,),
    )
)
@dataclass(frozen=True)
class ABPC(RegionPerturbation):
    """The area between the perturbation curves: 1/(L+1) Σ_{k=0..L} [f(x^(k) least first) - f(x^(k) most first)].

    What replacing any region does to the model is in both curves, and cancels.

    Attributes:
        groups: the regions; see `RegionPerturbation` for this and the rest.

    Source: Samek et al. (2017).

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0, 3.0]])
    >>> ABPC(fill=ap.fills.Baselines(ap.baselines.Zero()), score=ap.Logit())(field, x, x).values.item()
    1.0
    """

    def orders(self) -> tuple[bool, ...]:
        return (False, True)

    def combined(self, *heights: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        _, morf, lerf = heights
        return lerf - morf
