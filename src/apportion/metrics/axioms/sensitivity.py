"""Sensitivity and dummy: features that alone change the score get something, features that never do get nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.explainer import Passes
from apportion.core.game import Block, Fill, Game
from apportion.core.question import Question
from apportion.metrics.fidelity.copies import explained
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, players
from apportion.metrics.scores import Direction
from apportion.parts.masks.fills import Baselines

_PAPER = Paper("Sundararajan, Taly, Yan", 2017, "Axiomatic attribution for deep networks", "ICML")


def _drawn(q: Question, sizes: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Draw players of each example without repetition: their numbers [B, most], and which of the columns count."""
    widest = int(sizes.max())
    owner = torch.arange(len(q))
    score = q.stream("players").uniform(torch.zeros(len(q), widest), owner, 0 * owner)
    score = score.masked_fill(torch.arange(widest) >= sizes[:, None], 2.0)
    chosen = score.argsort(1)[:, :most]
    return chosen, torch.arange(chosen.shape[1]) < sizes.clamp(max=most)[:, None]


@register(
    MetricCard(
        title="Sensitivity (a)",
        paper=_PAPER,
        intent="How often a feature that alone differs from the baseline and changes the score gets a value.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        range=(0.0, 1.0),
        chance="1 for any map without zeros: judge `Dummy` beside",
        cost="one row forward and one explanation for each feature tried, and the baseline",
        cautions=("Baselines of the explainer should be those of the fill, else another question is answered.",),
    )
)
@dataclass(frozen=True)
class Sensitivity(Metric):
    """The share of features with φ_i ≠ 0 among those that change the score alone.

    For each feature i drawn, the point is the baseline but for x_i; where the score there differs from the baseline's
    by more than `least` of |f(x) - f(x')|, the axiom asks for a value at i. A value counts if its magnitude is above
    `least` of the largest in its map, made with the explainer's baselines for x.

    Undefined where none of the features drawn changes the score alone.

    Attributes:
        fill: the baseline, with one draw.
        features: drawn of each example; all if there are fewer.
        least: below which a change or a value counts as none.
        groups: the features; see `ranking.players`.

    Source: Sundararajan et al. (2017), section 2.1.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: 1 - torch.relu(1 - x[:, 0])), torch.tensor([[2.0]])   # their example: flat at 2
    >>> [Sensitivity()(field, x, m).values.item() for m in (ap.Gradient(), ap.IntegratedGradients())]
    [0.0, 1.0]
    """

    fill: Fill = field(default_factory=Baselines)
    features: int = 16
    least: float = 1e-6
    groups: Groups | None = None

    _positive = ("features",)
    _not_negative = ("least",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Put features into the baseline one by one, and explain where that changes the score."""
        groups = players(q, self.groups)
        game = Game(q, groups, self.fill)
        chosen, counts = _drawn(q, game.sizes, self.features)
        count = chosen.shape[1]

        def make(at: Tensor) -> Tensor:
            masks = torch.zeros(len(q), len(at), game.players, dtype=torch.bool)
            return masks.scatter_(2, chosen[:, at][..., None], True)

        alone = game.value(Block(count, make, where=counts)).double()
        none = game.value(torch.zeros(1, game.players, dtype=torch.bool)).double()
        span = (q.fx[:, None].double() - none).abs()
        change = (alone - none).abs()
        works = (change > self.least * torch.maximum(span, none.abs())) & counts.to(change.device)
        owner, column = works.nonzero(as_tuple=True)
        got = torch.zeros_like(works)
        if len(owner):
            masks = torch.zeros(len(owner), game.players, dtype=torch.bool)
            masks[torch.arange(len(owner)), chosen[owner.cpu(), column.cpu()]] = True
            points = tree.apply(lambda r: r[:, 0], game.rows(masks, owner, torch.zeros_like(column)))
            there_q = q.at(points, owner, column)  # not anew, so that the explainer's baseline can be the fill's
            part = by_player(there_q, explained(subject, there_q), groups).abs()
            there = part.gather(1, chosen[owner.cpu(), column.cpu()].to(part.device)[:, None])[:, 0]
            got[owner, column] = there > self.least * part.amax(1)
        total = works.sum(1)
        return Found(
            torch.where(total > 0, got.sum(1) / total, torch.nan),
            parts={"features": total},
            undefined={"no feature changes the score alone": total == 0},
        )

    def passes(self, q: Question) -> Passes:
        """Count a row for each feature drawn, the baseline and f(x)."""
        return Passes(self._count(q), 0, 1, once=1, exact=False)

    def _count(self, q: Question) -> int:
        labels = tree.leaves(players(q, self.groups).labels(q.x))
        return min(self.features, 1 + max(int(one.max()) for one in labels))

    def explanations(self, q: Question) -> int:
        """Once for each feature drawn, where it changes the score."""
        return self._count(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(features=4),)


@register(
    MetricCard(
        title="Dummy (sensitivity b)",
        paper=Paper(
            "Friedman",
            2004,
            "Paths and consistency in additive cost sharing",
            "International Journal of Game Theory 32",
        ),
        intent="How often a feature whose removal never changes the score gets a value.",
        direction=Direction.LOWER,
        range=(0.0, 1.0),
        chance="1 for any map without zeros",
        cost="two rows forward for each context of each feature tried",
        cautions=("A feature may matter in a context that was not drawn: more samples find fewer dummies, not more.",),
    )
)
@dataclass(frozen=True)
class Dummy(Metric):
    """The share of features with |φ_i| above `least` of the largest among those found to be dummies.

    A feature drawn is taken for a dummy where v(S with i) and v(S without i) agree to `least` of |f(x) - f(x')| for
    every context S: all others, none, and `samples` random ones, each other feature in with probability 1/2.

    Undefined where no feature drawn is a dummy.

    Attributes:
        fill: what stands in for absent features.
        features: how many are looked at, drawn for each example.
        samples: random contexts.
        least: what counts as nothing, as a share.
        groups: the features; see `ranking.players`.

    Source: Friedman (2004); sensitivity (b) of Sundararajan et al. (2017), section 2.1; the count of such features is
    the non-sensitivity of Nguyen and Martínez (2020).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x[:, 0] * x[:, 1]), torch.ones(1, 3)
    >>> [Dummy()(field, x, torch.tensor([[1.0, 1.0, v]])).values.item() for v in (0.0, 0.5)]
    [0.0, 1.0]
    """

    fill: Fill = field(default_factory=Baselines)
    features: int = 16
    samples: int = 4
    least: float = 1e-6
    groups: Groups | None = None

    _positive = ("features",)
    _not_negative = ("least", "samples")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Play each feature's contexts with and without it."""
        groups = players(q, self.groups)
        values = by_player(q, subject.map(q), groups).abs()
        game = Game(q, groups, self.fill)
        chosen, counts = _drawn(q, game.sizes, self.features)
        contexts, count, width = self.samples + 2, chosen.shape[1], game.players
        owner = torch.arange(len(q))

        def make(at: Tensor) -> Tensor:
            """Row (feature, context, without or with)."""
            feature, context, kept = at // (2 * contexts), at // 2 % contexts, at % 2
            masks = torch.zeros(len(q), len(at), width, dtype=torch.bool)
            masks[:, context == 1] = True
            for c in context[context > 1].unique().tolist():
                drawn = q.stream("contexts").uniform(torch.zeros(len(q), width), owner, torch.full_like(owner, c))
                masks[:, context == c] = (drawn < 0.5)[:, None]
            return masks.scatter_(2, chosen[:, feature][..., None], (kept == 1).expand(len(q), -1)[..., None])

        y = game.value(Block(count * contexts * 2, make)).double().reshape(len(q), count, contexts, 2)
        none = game.value(torch.zeros(1, width, dtype=torch.bool)).double()
        span = torch.maximum((q.fx[:, None].double() - none).abs(), none.abs())
        dummy = ((y[..., 1] - y[..., 0]).abs() <= self.least * span[..., None]).all(2) & counts.to(y.device)
        got = values.gather(1, chosen.to(values.device)) > self.least * values.amax(1, keepdim=True)
        total = dummy.sum(1)
        return Found(
            torch.where(total > 0, (got & dummy).sum(1) / total, torch.nan),
            parts={"dummies": total},
            undefined={"no feature drawn is a dummy": total == 0},
        )

    def passes(self, q: Question) -> Passes:
        """Count each context with and without each feature, the baseline and f(x)."""
        labels = tree.leaves(players(q, self.groups).labels(q.x))
        count = min(self.features, 1 + max(int(one.max()) for one in labels))
        return Passes(count * (self.samples + 2) * 2, 0, 1, once=1, exact=False)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(features=3, samples=2),)
