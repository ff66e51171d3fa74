"""ROAD: shares of the pixels imputed from their neighbors, so that no model has to be trained again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from apportion.core.card import Paper
from apportion.core.errors import ConfigError
from apportion.core.question import Question
from apportion.core.score import Decision, Probability, Score
from apportion.metrics.ablation.curves import Counts, Removing, drawn, sizes
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.masks.fills import Fill, NoisyLinear
from apportion.parts.masks.groups import Squares

_ROUNDED = 1e-9
"""A share times a count is a whole number where it is one on paper, as 0.7 of 10."""


@register(
    MetricCard(
        title="ROAD",
        paper=Paper(
            "Rong, Leemann, Borisov, Kasneci, Kasneci",
            2022,
            "A consistent and efficient evaluation strategy for attribution methods",
            "ICML",
        ),
        intent="How much more accurate the model stays when the lowest values are imputed than when the highest are.",
        direction=Direction.HIGHER,
        chance="0",
        cost="1 row a fraction and order: 14",
        cautions=(
            "One example's decisions are few bits: average over a data set, or take score=ap.Probability().",
            "The imputation smooths: what it cannot hide, such as large uniform regions, counts as kept.",
        ),
    )
)
@dataclass(frozen=True)
class ROAD(Removing):
    """Remove and debias: fractions of the pixels are imputed by the noisy mean of their neighbors, from either end.

    Value: the mean over fractions of s(lowest values imputed) - s(highest values imputed). The curves hold both, under
    "LeRF" and "MoRF", and the parts their means; averaged over a data set they are the accuracies of the original.
    For accuracy against labels give `target=labels`; each example's own top class is asked for otherwise.

    Attributes:
        groups: the players, as of `Removing`.
        fill: the imputation.
        score: whether the class is decided for; `ap.Probability()` for what it has of probability.
        fractions: shares of the players that are imputed, rising.

    Raises:
        ConfigError: fractions that do not rise, or outside of 0 to 1.
        InputError: no pictures, for the imputation of the original.

    Source: Rong et al. (2022), with the weights, noise and fractions of their code.

    >>> import apportion as ap, torch
    >>> field = ap.Field(lambda x: x.flatten(1)[:, :2])
    >>> x = torch.tensor([[[[0.5, 0.9], [0.1, 0.1]]]])
    >>> ROAD(fractions=(0.25,))(field, x, torch.tensor([[[[0.0, 1.0], [-1.0, 0.0]]]])).values
    tensor([1.], dtype=torch.float64)
    """

    fill: Fill = NoisyLinear()
    score: Score = Decision()
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        f = self.fractions
        if not f or not all(0 <= a <= 1 for a in f) or any(a >= b for a, b in pairwise(f)):
            raise ConfigError(f"ROAD(fractions={f})", "rising shares between 0 and 1", "write fractions=(.1, .5, .9)")

    def counts(self, q: Question) -> tuple[Counts, bool]:
        """Take so many players as fit into each share, as the authors do."""
        shares = torch.tensor(self.fractions, dtype=torch.float64)
        return (sizes(q, self.players(q))[:, None] * shares + _ROUNDED).long(), False

    def asked(self, q: Question) -> Iterable[tuple[Counts, bool]]:
        """Name the points of both orders."""
        gone = self.counts(q)[0]
        return [(gone, False), (gone, True)]

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Impute from either end."""
        removals, gone = self.removals(q, subject), self.counts(q)[0]
        curves, parts = {}, {}
        for name, lowest, first in (("MoRF", False, "highest"), ("LeRF", True, "lowest")):
            y = removals(gone, lowest)
            curves[name] = drawn(removals.share(gone, y), y, f"share of players imputed, {first} first", self.score)
            parts[name] = y.to(curves[name].x.dtype).mean(1)
        return Found(parts["LeRF"] - parts["MoRF"], curves, {**parts, "ties": removals.ties})

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give the original, and the probability with squares for players."""
        return cls(), cls(groups=Squares(2), score=Probability(), fractions=(0.0, 0.5))
