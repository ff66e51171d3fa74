"""Sensitivity-n: whether a map's sums over subsets tell what removing them does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from apportion.core.attribution import Groups
from apportion.core.card import Kind, Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.metrics.fidelity.subsets import correlated, game, sizes
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Curve, Direction
from apportion.metrics.statistics import Correlation, Pearson, Spearman
from apportion.parts.masks.fill import Fill
from apportion.parts.masks.fills import Baselines

FRACTIONS = (0.01, 0.013, 0.018, 0.024, 0.032, 0.043, 0.058, 0.077, 0.1, 0.14, 0.19, 0.25, 0.33, 0.45, 0.6, 0.8, 0.9)

CARD = MetricCard(
    title="Sensitivity-n",
    paper=Paper(
        "Ancona, Ceolini, Öztireli, Gross",
        2018,
        "Towards better understanding of gradient-based attribution methods for deep neural networks",
        "ICLR",
    ),
    intent="Correlation of summed attributions with the fall of the score, over random subsets of n players.",
    direction=Direction.HIGHER,
    range=(-1.0, 1.0),
    chance="about 0",
    cost="subsets times sizes, each different one once",
    kind=Kind.SALIENCE,
    cautions=(
        "Removed players make inputs unlike any the model has seen, the more the larger n.",
        "A correlation does not see the scale of a map, nor a number added to all of it.",
    ),
)


def checked_fractions(name: str, given: tuple[float, ...]) -> None:
    """Refuse fractions that are none.

    Raises:
        ConfigError: none at all, out of order, or outside (0, 1].
    """
    ascending = all(a < b for a, b in pairwise(given))
    if not given or not ascending or not given[0] > 0 or not given[-1] <= 1:
        raise ConfigError(f"{name}={given!r}", "ascending numbers in (0, 1]", f"write {name}=(.1, .2, .5)")


@register(CARD)
@dataclass(frozen=True)
class SensitivityN(Metric):
    """The correlation of Σ_{i∈S} φ_i with f(x) - f(x without S), over random S of n players each.

    For every n, subsets are drawn for each example on its own and correlated within it. The value is the mean over
    the sizes, the curve "correlation" has each of them against n as a share of the players; parts["n"] are the sizes.
    It is 1 for every n where f is additive in the players and the map exact.

    Attributes:
        fractions: n as shares of the number of players, rounded, at least one player and never all of them; those
            that come to the same n are measured once.
        samples: subsets of each size.
        correlation: `Pearson()` as in the paper, or `Spearman()`.
        groups: the players; pixels of pictures and else elements unless given.
        fill: what stands where players are removed; zeros in the paper.

    Undefined at a size where the map's sums or the scores are all alike, as for maps of one number everywhere; the
    value leaves such sizes out. parts["sizes"] counts the others.

    Raises:
        ConfigError: fractions that do not ascend within (0, 1].

    Source: Ancona et al. (2018). The settings are second-hand: code that cites the paper draws a hundred subsets of
    each size, up to 80 % of the players; 90 %, and which sizes lie below, are ours. Other code differs in more than
    settings: subsets shared by a whole batch, or nested in the order of the map, or correlated across examples, none
    of which is this quantity.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x @ torch.tensor([1.0, -2.0, 3.0, 1.0])), torch.ones(1, 4)
    >>> SensitivityN(samples=10)(field, x, ap.GradientTimesInput()).values
    tensor([1.], dtype=torch.float64)
    """

    _positive = ("samples",)

    fractions: tuple[float, ...] = FRACTIONS
    samples: int = 100
    correlation: Correlation = Pearson()
    groups: Groups | None = None
    fill: Fill = Baselines()

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_fractions("fractions", self.fractions)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Draw, sum, remove, correlate."""
        play = game(q, self.groups, self.fill)
        n, first = sizes(play.sizes, self.fractions)
        curve, why = correlated(q, play, subject.map(q), n, first, self.samples, self.correlation)
        new = curve.masked_fill(~first.to(curve.device), torch.nan)
        x = torch.tensor(self.fractions, dtype=torch.float64, device=curve.device)
        label = f"{type(self.correlation).__name__} correlation"
        return Found(
            new.nanmean(1),
            curves={"correlation": Curve(x, curve, "players removed, as a share", label)},
            parts={"n": n.to(curve.device), "sizes": (~new.isnan()).sum(1)},
            undefined=why,
        )

    def passes(self, q: Question) -> Passes:
        """Each subset once, at most."""
        _, first = sizes(game(q, self.groups, self.fill).sizes, self.fractions)
        rows = int(first.sum(1).max()) * self.samples * self.fill.draws
        return self.fill.added_to(Passes(0, 0, once=rows, exact=False))

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Small ones."""
        return (cls((0.02, 0.05, 0.3), 8), cls((0.2,), 6, Spearman()))
