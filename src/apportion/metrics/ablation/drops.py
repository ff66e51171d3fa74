"""Drops: what the map, scaled to a soft mask, leaves of the class, and what the rest does."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.config import is_reproducible, to_config
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.score import Probability, Score
from apportion.core.tree import Tree
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.baselines import Baseline, NetworkZero

_CAM = Paper(
    "Chattopadhyay, Sarkar, Howlader, Balasubramanian",
    2018,
    "Grad-CAM++: generalized gradient-based visual explanations for deep convolutional networks",
    "WACV",
)
_LIFT = Paper("Jung, Oh", 2021, "Towards better explanations of class activation mapping", "ICCV")
_OPTI = Paper("Zhang, Torres, Sicre, Avrithis, Ayache", 2024, "Opti-CAM: optimizing saliency maps", "CVIU")
_WIDE = "Wide masks win: one that is 1 all over but at a point has next to no drop, whatever the model looks at."
_CONSTANT = "the map is constant, so that least and greatest value do not make a mask of it"
_NOT_POSITIVE = "the score at the example is not above 0, so that a relative drop has no meaning"
_FULL = "the score at the example is 1 or more, which leaves nothing to gain"


class Soft:
    """Examples under the mask that a map is scaled to, each scored once for all metrics of the map.

    Attributes:
        mask: in [0, 1]; NaN for a constant map.
        constant: the examples of such maps.
        kept: the mean of the mask.
    """

    def __init__(self, q: Question, values: Tree, base: Baseline, score: Score) -> None:
        """Scale a map by its least and greatest value in each example; channels of pictures are summed before.

        Args:
            q: the examples.
            values: the map.
            base: what stands where the mask is 0.
            score: what is watched.
        """
        self.question, self.base, self.score = q, base, score
        one = tree.apply(lambda v, x: v.sum(1, keepdim=True) if x.ndim > 3 else v, values, q.x)
        flat = [v.flatten(1) for v in tree.leaves(one)]
        least = torch.stack([v.amin(1) for v in flat]).amin(0)
        most = torch.stack([v.amax(1) for v in flat]).amax(0)
        self.constant = most == least
        apart = torch.where(self.constant, torch.nan, most - least)
        self.mask = tree.apply(lambda v: (v - tree.per_row(least, v)) / tree.per_row(apart, v), one)
        masks = [
            m.double().expand_as(x).flatten(1) for m, x in zip(tree.leaves(self.mask), tree.leaves(q.x), strict=True)
        ]
        self.kept = torch.cat(masks, 1).mean(1)
        self._known: dict[str, Tensor] = {}

    def at_x(self) -> Float[Tensor, " B"]:
        """Score the examples as they are."""
        return self._once("x", lambda x, b, m: x[:, None])

    def of_kept(self) -> Float[Tensor, " B"]:
        """Score what the mask lets through."""
        return self._once("kept", lambda x, b, m: m * x[:, None] + (1 - m) * b)

    def of_rest(self) -> Float[Tensor, " B"]:
        """Score what the mask takes away."""
        return self._once("rest", lambda x, b, m: (1 - m) * x[:, None] + m * b)

    def of_nothing(self) -> Float[Tensor, " B"]:
        """Score what is left when everything is taken away."""
        return self._once("nothing", lambda x, b, m: b)

    def _once(self, name: str, mixed: Any) -> Tensor:
        if name not in self._known:
            q = self.question

            def rows(x: Tensor, base: Tensor, mask: Tensor) -> Tensor:
                return mixed(x, base, mask.nan_to_num(0)[:, None].to(x.dtype))

            points = tree.apply(rows, q.x, q.baseline_rows(self.base), self.mask)
            draws = tree.leaves(points)[0].shape[1]
            owner = torch.arange(len(q), device=q.device).repeat_interleave(draws)
            found = q.value(tree.apply(lambda t: t.flatten(0, 1), points), owner, self.score)
            self._known[name] = tree.wide(found.detach()).reshape(len(q), draws).mean(1)
        return self._known[name]


@dataclass(frozen=True)
class Masking(Metric):
    """Base of the metrics that multiply the example by its map.

    Attributes:
        base: what stands where the mask is 0: what the network reads as 0 unless given.
        score: what is compared; the sigmoid for models of one number.
    """

    base: Baseline = NetworkZero()
    score: Score = Probability()

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Scale the map, mask, and compare."""
        soft = self._soft(q, subject)
        y = soft.at_x()
        value, seen, at_ones = self.compared(soft, y)
        reasons = {_CONSTANT: soft.constant.to(y.device), **self.refused(y)}
        whole = [w for why, w in reasons.items() if why != _CONSTANT]
        refused = torch.stack(list(reasons.values())).any(0)
        at_ones = at_ones.masked_fill(torch.stack(whole).any(0), torch.nan) if whole else at_ones
        parts = {
            "kept": soft.kept,
            "all_ones": at_ones,
            "at_x": y,
            "masked": seen.masked_fill(reasons[_CONSTANT], torch.nan),
        }
        return Found(value.masked_fill(refused, torch.nan), parts=parts, undefined=reasons)

    def _soft(self, q: Question, subject: Subject) -> Soft:
        base, score = (
            json.dumps(c) if is_reproducible(c := to_config(part)) else part for part in (self.base, self.score)
        )
        return subject.share(("soft mask", base, score), lambda: Soft(q, subject.map(q), self.base, self.score))

    @abstractmethod
    def compared(self, soft: Soft, y: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        """Give the metric, the score it compares with that at the example, and the metric of a mask of ones."""

    def refused(self, y: Float[Tensor, " B"]) -> dict[str, Tensor]:
        """Say where the score at the example allows no comparison."""
        return {_NOT_POSITIVE: ~(y > 0)}

    def passes(self, q: Question) -> Passes:
        """Count the example, and a masked one for each baseline."""
        draws = self.base.draws
        return self.base.added_to(Passes(1 + draws, 0), scored=False)


@register(
    MetricCard(
        title="Average drop",
        paper=_CAM,
        intent="The share of the class's probability that is lost when the map's low values are masked out.",
        direction=Direction.LOWER,
        range=(0, 1),
        chance="depends on model and base; `parts['all_ones']` has that of no mask at all, which is 0",
        cost="2 rows",
        cautions=(_WIDE,),
    )
)
@dataclass(frozen=True)
class AverageDrop(Masking):
    """How much of the score is lost where only what the map points to is left: max(0, Y - O) / Y; low is good.

    Y is the score at x; O that at M ⊙ z, with z what the network reads and M the map, summed over the channels of a
    pixel and scaled to [0, 1] by its least and greatest value. z is normalized: where the field does that
    (`Field(normalize=...)`), x is mixed with the mean color, M ⊙ x + (1 - M) ⊙ mean, which is the same. The map is
    expected at the picture's size; `ap.explain` gives it so.

    Variants: `base=ap.baselines.Zero()` masks x itself, to black; drops in percent are 100 times this; drops that are
    not divided by Y, and maps that are used as they are, are found under this name too, and are not this metric.

    `parts` has the mean of the mask, `kept`, beside which a drop should be read, since large areas win; the metric of a
    mask of ones, `all_ones`; and both scores.

    Attributes:
        base: what stands where the mask is 0.
        score: what is watched.

    Source: Chattopadhyay et al. (2018); eq. (42) of the review by Wang et al. (2024).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0, 3.0]])
    >>> AverageDrop(score=ap.Logit())(field, x, torch.tensor([[0.0, 1.0, 2.0]])).values
    tensor([0.3333], dtype=torch.float64)
    """

    def compared(self, soft: Soft, y: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        seen = soft.of_kept()
        return (y - seen).clamp(min=0) / y, seen, torch.zeros_like(y)


@register(
    MetricCard(
        title="Increase in confidence",
        paper=_CAM,
        intent="Whether the class's probability rises when the map's low values are masked out.",
        direction=Direction.HIGHER,
        range=(0, 1),
        chance="depends on model and base; no mask at all has 0",
        cost="2 rows",
        cautions=(
            "A rise by one part in a million counts as much as one to certainty.",
            "Masking is no better known to the model than the picture: what it says there may rise by chance.",
        ),
    )
)
@dataclass(frozen=True)
class IncreaseInConfidence(Masking):
    """1 where the score rises when only what the map points to is left, O > Y, else 0; the mean is a share of examples.

    O, Y and the mask are those of `AverageDrop`.

    Attributes:
        base: what stands where the mask is 0.
        score: what is watched.

    Source: Chattopadhyay et al. (2018), who also call it rate of increase in confidence.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[-1.0, 2.0, 3.0]])
    >>> IncreaseInConfidence(score=ap.Logit())(field, x, torch.tensor([[0.0, 1.0, 1.0]])).values
    tensor([1.], dtype=torch.float64)
    """

    def compared(self, soft: Soft, y: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        seen = soft.of_kept()
        return (seen > y).to(y.dtype), seen, torch.zeros_like(y)

    def refused(self, y: Float[Tensor, " B"]) -> dict[str, Tensor]:
        return {}


@register(
    MetricCard(
        title="Average drop in deletion",
        paper=_LIFT,
        intent="The share of the class's probability that is lost when the map's high values are masked out.",
        direction=Direction.HIGHER,
        range=(None, 1),
        chance="depends on model and base; `parts['all_ones']` has that of deleting everything",
        cost="3 rows",
        cautions=("Wide masks win: deleting everything loses the class as well.",),
    )
)
@dataclass(frozen=True)
class AverageDropInDeletion(Masking):
    """How much of the score is lost without what the map points to: max(0, Y - D) / Y with D at (1 - M) ⊙ z.

    High is good. Y, z and M are those of `AverageDrop`; `all_ones` is the drop when everything is gone.

    Attributes:
        base: what stands where the mask is 1.
        score: what is watched.
        signed: whether rises count as negative drops, as the review by Wang et al. (2024) writes it, eq. (43).

    Source: Jung, Oh (2021).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0, 3.0]])
    >>> AverageDropInDeletion(score=ap.Logit())(field, x, torch.tensor([[0.0, 1.0, 2.0]])).values
    tensor([0.6667], dtype=torch.float64)
    """

    signed: bool = False

    def compared(self, soft: Soft, y: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        seen, nothing = soft.of_rest(), soft.of_nothing()
        drop, most = (y - seen) / y, (y - nothing) / y
        return (drop, seen, most) if self.signed else (drop.clamp(min=0), seen, most.clamp(min=0))

    def passes(self, q: Question) -> Passes:
        """Count the example, the masked one and the base, the latter two for each baseline."""
        return self.base.added_to(Passes(1 + 2 * self.base.draws, 0), scored=False)


@register(
    MetricCard(
        title="Average gain",
        paper=_OPTI,
        intent="The share of what the class's probability lacks that comes when the map's low values are masked out.",
        direction=Direction.HIGHER,
        range=(0, 1),
        chance="depends on model and base; no mask at all has 0",
        cost="2 rows",
        cautions=("Of examples that are almost certain it divides by almost nothing.",),
    )
)
@dataclass(frozen=True)
class AverageGain(Masking):
    """How much of what is missing to certainty comes when only what the map points to is left: max(0, O - Y) / (1 - Y).

    High is good; the counterpart of `AverageDrop`, with its O, Y and mask. It takes scores up to 1.

    Attributes:
        base: what stands where the mask is 0.
        score: what is watched.

    Source: Zhang et al. (2024).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[-0.5, 0.25, 0.75]])
    >>> AverageGain(score=ap.Logit())(field, x, torch.tensor([[0.0, 0.0, 1.0]])).values
    tensor([0.5000], dtype=torch.float64)
    """

    def compared(self, soft: Soft, y: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        seen = soft.of_kept()
        return (seen - y).clamp(min=0) / (1 - y), seen, torch.zeros_like(y)

    def refused(self, y: Float[Tensor, " B"]) -> dict[str, Tensor]:
        return {_FULL: ~(y < 1)}
