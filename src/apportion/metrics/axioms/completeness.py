"""Completeness: whether values sum to what the score changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Kind, Paper
from apportion.core.explainer import Passes
from apportion.core.protocols import Baseline
from apportion.core.question import Question
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register, rounding
from apportion.metrics.scores import Direction
from apportion.parts.baselines import Zero


@register(
    MetricCard(
        title="Completeness",
        paper=Paper("Sundararajan, Taly, Yan", 2017, "Axiomatic attribution for deep networks", "ICML"),
        intent="How far the values are from summing to the score's change from the baseline.",
        direction=Direction.LOWER,
        range=(0.0, None),
        chance="1 for a map of zeros",
        cost="one row forward for each baseline, and f(x)",
        kind=Kind.SALIENCE,
        cautions=("The last value of any map can be set so that the sum is right: completeness alone says little.",),
    )
)
@dataclass(frozen=True)
class Completeness(Metric):
    """|Σφ - (f(x) - mean f(x'))| / |f(x) - mean f(x')|: local accuracy, as a relative gap, on any map.

    0 for an exact attribution: a gap that rounding alone can make, by the size of what is summed, counts as none if it
    is a thousandth of the change at most.
    `Attribution.gap` says the same of what the method itself claims; this asks it of every method against one baseline.
    `parts["gap"]` is the difference in units of the score.

    Undefined where the score changes by no more than rounding.

    Attributes:
        baseline: x'; zero as missing input unless given. Of several the mean score counts.

    Source: Sundararajan et al. (2017), section 3, completeness; local accuracy of Lundberg and Lee (2017).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: 3 * x[:, 0] + x[:, 1]), torch.tensor([[1.0, 1.0]])
    >>> [Completeness()(field, x, torch.tensor([[3.0, v]])).values.item() for v in (1.0, 3.0)]
    [0.0, 0.5]
    """

    baseline: Baseline = field(default_factory=Zero)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Sum, and compare."""
        start, phi = q.references(self.baseline).value.mean(1).double(), subject.map(q)
        size = tree.total(tree.apply(torch.abs, phi)).double()
        return relative_gap(q, tree.total(phi).double(), size, start)

    def passes(self, q: Question) -> Passes:
        """Count the baselines and f(x)."""
        return Passes(0, 0, 1, once=q.references(self.baseline).value.shape[1])


def relative_gap(
    q: Question, total: Float[Tensor, " B"], size: Float[Tensor, " B"], start: Float[Tensor, " B"]
) -> Found:
    """Hold a sum of values against the score's change from a start, but for what rounding makes of either.

    Args:
        q: asked of.
        total: Σφ.
        size: Σ|φ|, of whose rounding the sum has its share.
        start: the score to which the values add up what it changes.
    """
    change, scores = q.fx.double() - start, q.fx.double().abs() + start.abs()
    gap, share = total - change, rounding(q) / 8  # errors of terms cancel: 8 units in the last place
    none = change.abs() <= share * scores
    least = torch.minimum(share * (scores + size), change.abs() / 1000)  # no map that is further off is exact
    found = gap.masked_fill(gap.abs() <= least, 0.0).abs() / change.abs()
    return Found(
        found.masked_fill(none, torch.nan),
        parts={"gap": gap},
        undefined={"the score changes by no more than rounding": none},
    )
