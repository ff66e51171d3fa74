"""Region perturbation: regions replaced from the most or the least relevant on, and what is made of both curves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.question import Question
from apportion.metrics.ablation.curves import Counts, Stepwise, area, drawn, height, new
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import players
from apportion.metrics.scores import Curve, Direction, Scores
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
        fill: what they are replaced with; noise between the bounds, which only the user knows: `Field(bounds=...)`
            declares them, and the range of a batch would make scores depend on it.
        score: what is watched, at every point of the curve.
        step: regions at a time; one unless given.
        limit: L, the regions that go at most; None for all.
    """

    _side: ClassVar[int] = 9

    fill: Fill = Baselines(UniformNoise())
    limit: int | None = 100

    def players(self, q: Question) -> Groups:
        """Choose the regions."""
        if self.groups is None and isinstance(q.x, Tensor) and q.x.ndim == 4:
            return Squares(self._side)
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

    def level(self, gone: Counts, y: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        """Make one number of a curve."""
        return height(gone, y)

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
            heights.append(self.level(gone, y))
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


@register(
    MetricCard(
        title="Degradation",
        paper=Paper(
            "Schulz, Sixt, Tombari, Landgraf",
            2020,
            "Restricting the flow: information bottlenecks for attribution",
            "ICLR",
        ),
        intent="The area between the curves for the least and the most relevant tiles, of what there is to lose.",
        direction=Direction.HIGHER,
        chance="0",
        cost="2 rows a tile: one for each order, and both ends",
        cautions=("Tiles of one color take pictures away from the data; judge a random map beside.",),
    )
)
@dataclass(frozen=True)
class Degradation(RegionPerturbation):
    """The integral between both curves of tiles replaced, rescaled by what the data's pictures have to lose.

    ∫ [s(least first) - s(most first)] over the share of tiles gone, by trapezoids, with s = (f - b) / (t₁ - b): t₁ is
    the mean score of the pictures and b that of pictures without any tile, both over the data. They are not known
    while examples are judged one by one, so values are in units of f; `ap.metrics.rescaled` of all scores brings them
    to those of the source, and so do `full` and `empty` from the start. As t₁ and b know nothing of maps, the order of
    methods is the same. Both curves have the same ends, so this is `ABPC` (L + 1) / L at the same settings.

    `parts` has each example's score before and after, `full` and `empty`.

    Attributes:
        groups: the tiles; squares of 8 × 8 pixels unless given, and `Squares(14)` for the source's other setting.
        fill: what stands in their place; the mean color, zeros where the network reads, as in code for the source.
        full: t₁, if known.
        empty: b, if known.
        limit: None, since b is the score when all is gone.

    Raises:
        ConfigError: one of `full` and `empty` alone, nothing to lose between them, or a limit.

    Source: Schulz et al. (2020), section 4.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0, 3.0]])
    >>> found = Degradation(fill=ap.fills.Baselines(ap.baselines.Zero()), score=ap.Logit())(field, x, x)
    >>> round(found.values.item(), 3), round(ap.metrics.rescaled(found).values.item(), 3)
    (1.333, 0.222)
    """

    _side = 8

    fill: Fill = Baselines(NetworkZero())
    limit: int | None = None
    full: float | None = None
    empty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            raise ConfigError(f"Degradation(limit={self.limit})", "None, since b is the score of nothing", "use ABPC")
        if (self.full is None) != (self.empty is None):
            raise ConfigError("one of full and empty alone", "both, or none", "give both, or use ap.metrics.rescaled")
        if self.full is not None and self.empty is not None and self.full <= self.empty:
            raise ConfigError(
                f"Degradation(full={self.full}, empty={self.empty})", "something to lose", "give full above empty"
            )

    def orders(self) -> tuple[bool, ...]:
        return (False, True)

    def combined(self, *heights: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        _, morf, lerf = heights
        return lerf - morf

    def level(self, gone: Counts, y: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        return area(gone.to(y.device, torch.float64), y)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Remove tile by tile, and note both ends."""
        found, gone = super().measure(q, subject, truth), self.until(q)
        ends = tree.wide(self.removals(q, subject)(gone[:, [0, -1]]))
        parts = {**found.parts, "full": ends[:, 0], "empty": ends[:, 1]}
        if self.full is None or self.empty is None:
            return replace(found, parts=parts)
        return replace(found, **_in_units(found, self.full, self.empty), parts=parts)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give small squares, and pixels in known units."""
        return cls(groups=Squares(2)), cls(Squares(1), step=7, full=0.9, empty=0.1)


def _in_units(found: Found | Scores, full: float, empty: float) -> dict[str, Any]:
    """Give values and curves in units of what there is to lose."""
    lost = full - empty
    curves = {
        name: replace(c, y=(c.y - empty) / lost, y_label=f"{c.y_label}, rescaled") for name, c in found.curves.items()
    }
    return {"values": found.values / lost, "curves": curves}


def rescaled(scores: Scores) -> Scores:
    """Bring scores of `Degradation` to the source's units, by t₁ and b of the examples judged, those of controls alike.

    Intervals of the result take both as known.

    Args:
        scores: of all examples.

    Returns:
        What `Degradation(full=t₁, empty=b)` would have found.

    Raises:
        InputError: scores of another metric, or rescaled already; pictures that have nothing to lose.
    """
    if not {"full", "empty"} <= scores.parts.keys() or scores.metric.get("full") is not None:
        raise InputError(f"scores of {scores.name}", "those of Degradation() without full and empty", "judge by it")
    full, empty = (float(scores.parts[name].nanmean()) for name in ("full", "empty"))
    if not full > empty:
        raise InputError(
            f"a mean score of {full:g} that is {empty:g} with all tiles gone",
            "something to lose",
            "choose another fill",
        )
    config = scores.metric | {"full": full, "empty": empty}
    controls = {name: replace(c, metric=config, **_in_units(c, full, empty)) for name, c in scores.controls.items()}
    return replace(scores, metric=config, controls=controls, **_in_units(scores, full, empty))
