"""Faithfulness correlation: sums over subsets of one size against what removing them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from apportion.core.attribution import Groups
from apportion.core.card import Kind, Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.metrics.fidelity.subsets import correlated, game, sizes
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.metrics.statistics import Correlation, Pearson
from apportion.parts.masks.fill import Fill
from apportion.parts.masks.fills import Baselines

CARD = MetricCard(
    title="Faithfulness correlation",
    paper=Paper("Bhatt, Weller, Moura", 2020, "Evaluating and aggregating feature-based model explanations", "IJCAI"),
    intent="Correlation of summed attributions with the fall of the score, over random subsets of one size.",
    direction=Direction.HIGHER,
    range=(-1.0, 1.0),
    chance="about 0",
    cost="subsets, each different one once",
    kind=Kind.SALIENCE,
    cautions=("It is sensitivity-n at one n, and says nothing of the others.",),
)


@register(CARD)
@dataclass(frozen=True)
class FaithfulnessCorrelation(Metric):
    """corr_S(Σ_{i∈S} φ_i, f(x) - f(x with x_S = x̄_S)) over random S of one fixed size.

    The same quantity as `SensitivityN` at a single n.

    Attributes:
        size: of a subset, in players; or None for `fraction`.
        fraction: of the players, rounded, where no size is given; the definition leaves it open, and a quarter is ours.
        samples: subsets; a hundred is ours too, as at `SensitivityN`.
        correlation: `Pearson()` in the paper.
        groups: the players; unless given, pixels of pictures and elements of all else, such as rows of a table.
        fill: x̄, what absent players become.

    Undefined where all sums, or all scores, are one number.

    Raises:
        ConfigError: a fraction outside (0, 1), or a size that leaves no player.

    Source: Bhatt et al. (2020), definition of μ_F.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x @ torch.tensor([1.0, -2.0, 3.0, 1.0])), torch.ones(1, 4)
    >>> FaithfulnessCorrelation(size=2)(field, x, torch.tensor([[-1.0, 2.0, -3.0, -1.0]])).values
    tensor([-1.], dtype=torch.float64)
    """

    _positive = ("samples",)

    size: int | None = None
    fraction: float = 0.25
    samples: int = 100
    correlation: Correlation = Pearson()
    groups: Groups | None = None
    fill: Fill = Baselines()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction < 1:
            raise ConfigError(f"fraction={self.fraction!r}", "between 0 and 1", "write fraction=.25")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size={self.size!r}", "1 or more", "give the number of players in a subset")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Draw, sum, remove, correlate."""
        play = game(q, self.groups, self.fill)
        n, first = sizes(play.sizes, (self.fraction,))
        if self.size is not None:
            n = torch.full_like(n, self.size)
            if self.size >= int(play.sizes.min()):
                raise ConfigError(
                    f"size={self.size} of an example of {int(play.sizes.min())} player(s)",
                    "fewer than there are, so that subsets differ",
                    "give a smaller size, or a fraction",
                )
        curve, why = correlated(q, play, subject.map(q), n, first, self.samples, self.correlation)
        return Found(curve[:, 0], parts={"n": n[:, 0].to(curve.device)}, undefined=why)

    def passes(self, q: Question) -> Passes:
        """Each subset once, at most."""
        return self.fill.added_to(Passes(0, 0, once=self.samples * self.fill.draws, exact=False))

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Small ones."""
        return (cls(samples=8), cls(size=3, samples=6))
