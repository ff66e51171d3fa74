"""Effective complexity: how many of a map's first players it takes to keep the score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Passes
from apportion.core.game import Block, Fill, Game
from apportion.core.question import Question
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, order, players
from apportion.metrics.scores import Curve, Direction
from apportion.parts.masks.fills import Baselines

CARD = MetricCard(
    title="Effective complexity",
    paper=Paper("Nguyen, Martínez", 2020, "On quantitative aspects of model interpretability", "arXiv:2007.07584"),
    intent="The share of players, in the order of their magnitudes, that must be kept for the score to stay.",
    direction=Direction.LOWER,
    range=(0.0, 1.0),
    chance="that of a map that ranks at random: ask for it as a control",
    cost="one row forward for each step, and f(x)",
    cautions=("A fill that the network takes for something else decides as much as the map does.",),
)


@register(CARD)
@dataclass(frozen=True)
class EffectiveComplexity(Metric):
    """The least share k/P of players, by falling |φ|, from which on |f(x_k) - f(x)| ≤ tolerance |f(x) - f(∅)|.

    x_k keeps the first k players and fills the rest; ∅ keeps none. The source bounds the expected loss over draws of
    the rest by an absolute number; a fill with several draws gives the mean score instead, and a bound relative to what
    all players together change can be compared between examples.

    Undefined where removing all players changes nothing.

    Attributes:
        fill: what stands in for the rest.
        tolerance: how far the score may be away, as a share of |f(x) - f(∅)|.
        steps: numbers of players that are tried, evenly spread over 0 to P; all of them if P is less.
        groups: what is kept or filled at once; see `ranking.players`.

    Source: Nguyen and Martínez (2020), section 3.2, definition of effective complexity.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x[:, 0] * 4 + x[:, 1]), torch.ones(1, 4)
    >>> EffectiveComplexity(tolerance=0.25)(field, x, ap.GradientTimesInput()).values
    tensor([0.2500])
    """

    fill: Fill = field(default_factory=Baselines)
    tolerance: float = 0.1
    steps: int = 50
    groups: Groups | None = None

    _positive = ("steps",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance}", "0 or more, and below 1", "write tolerance=.1")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Keep more and more of the first players."""
        groups = players(q, self.groups)
        first = order(q, by_player(q, subject.map(q), groups).abs())
        count = first.shape[1]
        rank = (
            torch.empty_like(first).scatter_(1, first, torch.arange(count, device=first.device).expand_as(first)).cpu()
        )
        sizes = self._sizes(count)
        game = Game(q, groups, self.fill)

        def make(at: Tensor) -> Tensor:
            return rank[:, None] < sizes[at][:, None]

        y = game.value(Block(len(sizes), make))
        span = (y[:, -1] - y[:, 0])[:, None].abs()
        far = (y - y[:, -1:]).abs() > self.tolerance * span
        steps = torch.arange(1, len(sizes) + 1, device=y.device)
        reached = (far * steps).amax(1)  # behind the last step that is too far
        share = sizes.to(y) / count
        none = span[:, 0] == 0
        return Found(
            torch.where(none, torch.nan, share[reached.clamp(max=len(sizes) - 1)]),
            curves={"score": Curve(share, y, "share of players kept", "score")},
            undefined={"removing everything changes nothing": none},
        )

    def _sizes(self, count: int) -> Tensor:
        return torch.linspace(0, count, min(self.steps, count) + 1, dtype=torch.float64).round().long().unique()

    def passes(self, q: Question) -> Passes:
        """Count a row for each number of players that is tried, times the draws of the fill."""
        labels = players(q, self.groups).labels(q.x)
        count = 1 + int(labels.max()) if isinstance(labels, Tensor) else 1 + max(int(t.max()) for t in labels)
        rows = len(self._sizes(count))
        return Passes(rows * int(getattr(self.fill, "draws", 1)), 0, 1, exact=False)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(steps=8), cls(tolerance=0.0, steps=5))
