"""How much of a map's mass, or of its highest pixels, lies on the object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from apportion.core.card import Paper
from apportion.core.config import whole
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.localization.pointing import TRUTH, made_up
from apportion.metrics.localization.region import OnRegions, masks, picture_map, regions
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import order
from apportion.metrics.scores import Direction


def within(m: Tensor, on: Tensor, of: str) -> tuple[Tensor, Tensor]:
    """Give the share of the mass that lies on a mask, and where there is none."""
    mass = (m.abs() if of == "absolute" else m.clamp(min=0)).flatten(1)
    total = mass.sum(1)
    return torch.where(total > 0, (mass * on.flatten(1)).sum(1) / total, torch.nan), total <= 0


@register(
    MetricCard(
        title="Energy-based pointing game",
        paper=Paper(
            "Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu",
            2020,
            "Score-CAM: score-weighted visual explanations",
            "CVPR workshops",
        ),
        intent="What share of a map's mass lies on the object.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="the share of the picture that the object covers",
        cautions=("A map that reads the object's surroundings, as the classifier may, is punished for being true.",),
    )
)
@dataclass(frozen=True)
class EnergyPointingGame(OnRegions):
    """Σ of m⁺ on the object over Σ m⁺: the proportion of energy inside of Wang et al.

    With signed sums, as relevance mass accuracy is sometimes computed, the share may exceed 1 or be negative; so
    positive parts count, or by option magnitudes.

    Undefined for maps without a positive value (for magnitudes, of zeros), which others score 0, and without an object.

    Attributes:
        of: positive parts, as the source has, or magnitudes.

    Source: Wang et al. (2020), section 4.2; with magnitudes, relevance mass accuracy of Arras et al. (2022).

    >>> import apportion as ap
    >>> map, mask = torch.tensor([[[[3.0, 1.0, -4.0]]]]), torch.tensor([[[True, False, False]]])
    >>> EnergyPointingGame()(ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 3), map, truth=mask).values
    tensor([0.7500])
    """

    of: Literal["positive", "absolute"] = "positive"

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Sum inside, and all."""
        m = picture_map(q, subject)
        on = masks(regions(truth, m), m)
        values, none = within(m, on, self.of)
        missing = ~on.flatten(1).any(1)
        return Found(
            values.masked_fill(missing, torch.nan),
            undefined={"no object": missing, f"a map without {self.of} mass": none & ~missing},
        )

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls("absolute"))

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)


@register(
    MetricCard(
        title="Grid pointing game",
        paper=Paper("Rao, Böhle, Schiele", 2022, "Towards better understanding attribution methods", "CVPR"),
        intent="What share of a map's positive mass lies in the cell of a grid of pictures that the class is in.",
        direction=Direction.HIGHER,
        truth="the number of the right cell for each example, row by row from 0",
        range=(0.0, 1.0),
        chance="1 / grid²",
        cautions=(
            "A network may read several cells of a grid of pictures; with heads that see one each (DiFull) it cannot.",
        ),
    )
)
@dataclass(frozen=True)
class GridPointingGame(Metric):
    """Σ of m⁺ in the cell over Σ m⁺, on a picture that is a grid of pictures.

    Maps without a positive value get 0, as in the source's code; `parts["empty"]` says which they are.

    Attributes:
        grid: cells along each side.
        empty: what such maps get; None leaves them undefined.

    Raises:
        InputError: a picture that the cells do not divide, or a cell that is not there.

    Source: Rao et al. (2022), section 3.1, where it is the localization score L_i; DiFull and DiPart are
    `ap.planted` models it is asked on.

    >>> import apportion as ap
    >>> map = torch.tensor([[[[3.0, 1.0], [-4.0, 0.0]]]])
    >>> GridPointingGame()(ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 2, 2), map, truth=[0]).values
    tensor([0.7500])
    """

    grid: int = 2
    empty: float | None = 0.0

    _positive = ("grid",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Sum in the cell, and all."""
        m = picture_map(q, subject)
        high, wide = m.shape[1:]
        n = self.grid
        if high % n or wide % n:
            raise InputError(f"{n} × {n} cells in {high} × {wide} pixels", "cells of one size", "choose another grid")
        cell = self._cells(truth, len(m))
        labels = torch.arange(n * n).reshape(n, n).repeat_interleave(high // n, 0).repeat_interleave(wide // n, 1)
        on = (labels == torch.tensor(cell)[:, None, None]).to(m.device)
        values, none = within(m, on, "positive")
        if self.empty is None:
            return Found(values, parts={"empty": none}, undefined={"a map without positive mass": none})
        return Found(values.masked_fill(none, self.empty), parts={"empty": none})

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls(empty=None))

    def check_truth(self, q: Question, truth: Any) -> None:
        """Read the numbers of the cells."""
        self._cells(truth, len(q))

    def _cells(self, truth: Any, count: int) -> list[Any]:
        given = truth.tolist() if isinstance(truth, Tensor) else truth
        cell = [whole(c) for c in given] if isinstance(given, Iterable) else []
        if len(cell) != count or any(c is None or not 0 <= c < self.grid**2 for c in cell):
            raise InputError(
                f"cells {cell[:8] or kind_of(truth)} for {count} example(s)",
                f"one each, from 0 to {self.grid**2 - 1}",
                "count row by row",
            )
        return cell

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return [i % 4 for i in range(len(x))]  # pyright: ignore[reportArgumentType]


@register(
    MetricCard(
        title="Relevance rank accuracy",
        paper=Paper(
            "Arras, Osman, Samek",
            2022,
            "CLEVR-XAI: a benchmark dataset for the ground truth evaluation of neural network explanations",
            "Information Fusion 81",
        ),
        intent="What share of the highest pixels, as many as the object has, lies on the object.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="the share of the picture that the object covers",
    )
)
@dataclass(frozen=True)
class RelevanceRank(OnRegions):
    """|P_K ∩ object| / K, with P_K the K highest pixels and K the object's; ties in an order drawn for the example.

    Undefined without an object.

    Source: Arras et al. (2022), relevance rank accuracy.

    >>> import apportion as ap
    >>> map, mask = torch.tensor([[[[3.0, 1.0, 2.0]]]]), torch.tensor([[[True, True, False]]])
    >>> RelevanceRank()(ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 3), map, truth=mask).values
    tensor([0.5000])
    """

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Rank, and look as far as the object is large."""
        m = picture_map(q, subject)
        on = masks(regions(truth, m), m).flatten(1)
        hits = on.gather(1, order(q, m.flatten(1))).to(m).cumsum(1)
        size = on.sum(1)
        share = hits.gather(1, (size - 1).clamp(min=0)[:, None])[:, 0] / size
        return Found(share.masked_fill(size == 0, torch.nan), undefined={"no object": size == 0})

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)


@register(
    MetricCard(
        title="Top-k intersection",
        paper=Paper("Theiner, Müller-Budack, Ewerth", 2022, "Interpretable semantic photo geolocation", "WACV"),
        intent="What share of the k highest pixels lies on the object.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="the share of the picture that the object covers",
    )
)
@dataclass(frozen=True)
class TopKIntersection(OnRegions):
    """|P_k ∩ object| / k, with P_k the k highest pixels; over min(k, object) by option, so that 1 can be reached.

    Undefined without an object.

    Attributes:
        k: pixels, or a share of all if below 1.
        reachable: divide by no more than the object has.

    Source: Theiner et al. (2022), section 4.3.

    >>> import apportion as ap
    >>> map, mask = torch.tensor([[[[3.0, 1.0, 2.0]]]]), torch.tensor([[[True, False, False]]])
    >>> field, x = ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 3)
    >>> [float(TopKIntersection(2, r)(field, x, map, truth=mask).values) for r in (False, True)]
    [0.5, 1.0]
    """

    k: float = 0.1
    reachable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k > 0 or (self.k >= 1 and self.k != int(self.k)):
            raise ConfigError(f"k={self.k}", "a whole number of pixels, or a share below 1", "write k=1000 or k=.1")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Rank, and look at the first k."""
        m = picture_map(q, subject)
        on = masks(regions(truth, m), m).flatten(1)
        count = on.shape[1]
        k = max(1, round(self.k * count)) if self.k < 1 else int(self.k)
        if k > count:
            raise InputError(f"k={k} of {count} pixel(s)", f"at most {count}", "write k=.1 for a tenth of them")
        hits = on.gather(1, order(q, m.flatten(1))[:, :k]).sum(1).to(m)
        size = on.sum(1)
        over = size.clamp(max=k) if self.reachable else torch.full_like(size, k)
        return Found((hits / over).masked_fill(size == 0, torch.nan), undefined={"no object": size == 0})

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls(20, True))

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)
