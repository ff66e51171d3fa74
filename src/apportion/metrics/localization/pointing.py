"""Pointing games: whether the highest point of a map lies on the object, and how its highest parts do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core.card import Paper
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.localization.region import OnRegions, Region, correct, masks, picture_map, regions
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import order
from apportion.metrics.scores import Curve, Direction
from apportion.parts.baselines import blur

TRUTH = "where the object is, one entry an example: a mask [H, W] or an ap.metrics.Region"
"""What these metrics compare with, in words."""


def made_up(x: Tree) -> Any:
    """Make up a small object in each picture, for the conformance suite."""
    mask = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.bool)  # pyright: ignore[reportAttributeAccessIssue]
    mask[:, 2:5, 3:6] = True
    return list(mask)


@register(
    MetricCard(
        title="Pointing game",
        paper=Paper(
            "Zhang, Bargal, Lin, Brandt, Shen, Sclaroff",
            2018,
            "Top-down neural attention by excitation backprop",
            "IJCV 126",
        ),
        intent="Whether the highest point of a map lies on the object, or close by.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="the share of the picture that lies on the object or within the tolerance",
        cost="none; a row forward with `top`",
        cautions=(
            "Objects are in the middle of photographs: judge ap.controls.CenterGaussian() beside.",
            "It asks whether map and annotation agree; a classifier that reads the background should fail it.",
        ),
    )
)
@dataclass(frozen=True)
class PointingGame(OnRegions):
    """1 where the map's maximum is less than `tolerance` pixels of the original picture from the object, else 0.

    Where several points share the maximum, the share of them that hit: a map of zeros gets what a random point would.
    The source averages over the examples of each category first, then over categories: `ap.metrics.by_category`.

    Undefined without an object; and with `top`, where the target is not among that many highest outputs.

    Attributes:
        tolerance: in pixels of the original picture, whose size relative to the explained one is `Region.scale`.
        smooth: standard deviation of a blur before the maximum is sought, as a share of the longer side: .02 is what
            TorchRay does for maps of gradients.
        top: examples count whose target is among so many highest outputs; all unless given.

    Source: Zhang et al. (2018), section 5.1; TorchRay's code for the tolerance.

    >>> import apportion as ap
    >>> x, map = torch.zeros(1, 1, 2, 40), torch.zeros(1, 1, 2, 40)
    >>> map[0, 0, 0, 20], mask = 1, torch.arange(40).expand(1, 2, 40) < 3
    >>> field = ap.Field(lambda x: x.sum((1, 2, 3)))
    >>> [PointingGame(t)(field, x, map, truth=mask).values.item() for t in (15, 19)]
    [0.0, 1.0]
    """

    tolerance: float = 15.0
    smooth: float = 0.0
    top: int | None = None

    _not_negative = ("tolerance", "smooth")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Find the maxima, and how far each is from the object."""
        m = picture_map(q, subject)
        where = regions(truth, m)
        m = blur(m[:, None], self.smooth * max(m.shape[1:]))[:, 0] if self.smooth else m
        highest = m == m.amax((1, 2), keepdim=True)
        hits = [self._near(one, top) for one, top in zip(where, highest, strict=True)]
        values = torch.stack([h.to(m) for h in hits])
        missing = torch.stack([~one.mask.any() for one in where]).to(m.device)
        wrong = ~correct(q, self.top) if self.top else torch.zeros_like(missing)
        return Found(
            values.masked_fill(missing | wrong, torch.nan),
            parts={
                "tied": highest.sum((1, 2)),
                "difficult": torch.tensor([one.difficult for one in where], device=m.device),
            },
            undefined={"no object": missing, f"not in the top {self.top}": wrong & ~missing},
        )

    def _near(self, one: Region, highest: Tensor) -> Tensor:
        at = highest.nonzero().cpu().double()
        if not self.tolerance:
            return one.mask[tuple(at.long().T)].double().mean()
        scale = torch.tensor(one.scale, dtype=torch.float64)
        object_ = one.mask.nonzero().double() * scale
        if not len(object_):
            return torch.tensor(0.0, dtype=torch.float64)
        near = [
            (torch.cdist(part * scale, object_).amin(1) < self.tolerance).double()
            for part in at.split(max(1, (1 << 22) // len(object_)))
        ]
        return torch.cat(near).mean()

    def passes(self, q: Question) -> Passes:
        """Count the pass that tells which targets are among the highest outputs."""
        return Passes(1 if self.top else 0, 0, 0)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(tolerance=0), cls(tolerance=2, smooth=0.1), cls(tolerance=1.5, top=3))

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)


@register(
    MetricCard(
        title="Extended pointing game",
        paper=Paper(
            "Gu, Yang, Tresp",
            2018,
            "Understanding individual decisions of CNNs via contrastive backpropagation",
            "ACCV",
        ),
        intent="How much of a map's highest parts lies on the object, over how much of its energy they carry.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="the share of the picture that the object covers",
        cautions=("The source gives the idea without every detail; the docstring says what is computed.",),
    )
)
@dataclass(frozen=True)
class ExtendedPointingGame(OnRegions):
    """The area under the share of pixels on the object, among the fewest that carry a share p of the positive energy.

    For p = 1/levels, ..., 1 the pixels are taken by falling value until their positive parts sum to p of the total; the
    curve has what share of them lies on the object, and the value is its mean over p. Ties are taken in an order drawn
    for the example.

    Undefined without an object, and for maps without a positive value.

    Attributes:
        levels: of p.

    Source: Gu et al. (2018), section 4.

    >>> import apportion as ap
    >>> map, mask = torch.tensor([[[[4.0, 3.0, 2.0, 1.0]]]]), torch.tensor([[[True, True, False, False]]])
    >>> field, x = ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 4)
    >>> s = ExtendedPointingGame(levels=2)(field, x, map, truth=mask)
    >>> s.curves["share on the object"].y
    tensor([[1.0000, 0.5000]])
    """

    levels: int = 100

    _positive = ("levels",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Sort once, sum up energy and hits, and read both at each level."""
        m = picture_map(q, subject)
        on = masks(regions(truth, m), m).flatten(1)
        flat = m.flatten(1).clamp(min=0)
        first = order(q, flat)
        energy = flat.gather(1, first).double().cumsum(1)
        hits = on.gather(1, first).double().cumsum(1)
        total = energy[:, -1:]
        p = torch.arange(1, self.levels + 1, device=m.device, dtype=torch.float64) / self.levels
        taken = torch.searchsorted(energy, total * p * (1 - 1e-12)).clamp(max=flat.shape[1] - 1)
        share = hits.gather(1, taken) / (taken + 1)
        missing, flatly = ~on.any(1), total[:, 0] <= 0
        none = missing | flatly
        return Found(
            share.mean(1).masked_fill(none, torch.nan).to(m),
            curves={
                "share on the object": Curve(
                    p.to(m),
                    share.masked_fill(none[:, None], torch.nan).to(m),
                    "share of the energy",
                    "share on the object",
                )
            },
            undefined={"no object": missing, "a map without a positive value": flatly & ~missing},
        )

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(levels=7),)

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)
