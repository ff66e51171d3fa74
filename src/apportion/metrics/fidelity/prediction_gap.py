"""Prediction gaps: how the prediction moves when important, or unimportant, players are disturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.explainer import Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.score import Probability, Score
from apportion.metrics.fidelity.sensitivity_n import checked_fractions
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, order, players, ties
from apportion.metrics.scores import Curve, Direction
from apportion.parts.masks.fills import Baselines
from apportion.parts.noise import Gaussian, NoiseModel, UniformBox

OPENXAI = Paper(
    "Agarwal, Krishna, Saxena, Pawelczyk, Johnson, Puri, Zitnik, Lakkaraju",
    2022,
    "OpenXAI: towards a transparent evaluation of model explanations",
    "NeurIPS datasets and benchmarks",
)


@dataclass(frozen=True)
class _Gap(Metric):
    """What the two have in common: the mean move of the score under noise in some of the players."""

    _positive = ("samples",)

    important: ClassVar[bool]

    fractions: tuple[float, ...] = (0.25,)
    noise: NoiseModel = Gaussian(0.1, relative=False)
    samples: int = 100
    score: Score = Probability()
    groups: Groups | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_fractions("fractions", self.fractions)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Rank, disturb, compare."""
        play = Game(q, players(q, self.groups), Baselines())  # for its players only
        size = by_player(q, subject.map(q), players(q, self.groups)).abs()
        own = play.own.to(size.device)
        place = order(q, size.masked_fill(~own, -1)).argsort(1)
        share = torch.tensor(self.fractions, dtype=torch.float64)
        top = (play.sizes[:, None] * share).round().long().clamp(min=1).to(size.device)
        every = torch.arange(len(q), device=q.device)
        here, gaps = tree.wide(q.value(q.x, every, self.score).detach()), []
        for step, owner in q.grid(len(self.fractions) * self.samples, "disturbed copies"):
            disturbed = (place[owner] < top[owner, step // self.samples][:, None]) == self.important
            kept = play.elements(~(disturbed & own[owner]), owner)
            noisy = self.noise(q, owner, step % self.samples, "gap")
            rows = tree.apply(lambda k, x, n, owner=owner: torch.where(k, x[owner], n), kept, q.x, noisy)
            gaps.append((tree.wide(q.value(rows, owner, self.score).detach()) - here[owner]).abs())
        curve = torch.cat(gaps).reshape(len(self.fractions), self.samples, len(q)).mean(1).T
        return Found(
            curve.mean(1),
            curves={"gap": Curve(share.to(curve.device), curve, "players called important, as a share", "mean |Δ|")},
            parts={"ties": ties(size)},
        )

    def passes(self, q: Question) -> Passes:
        """Each copy once, and the example."""
        return Passes(len(self.fractions) * self.samples + 1, 0, 0)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Small ones."""
        return (cls(samples=4), cls((0.1, 0.5), UniformBox(0.3), 2))


@register(
    MetricCard(
        title="Prediction gap on important feature perturbation (PGI)",
        paper=OPENXAI,
        intent="How far the prediction moves when the players a map calls important are disturbed.",
        direction=Direction.HIGHER,
        range=(0.0, None),
        chance="what as many random players give",
        cost="samples times fractions, and f(x)",
        cautions=("It rewards players with steep slopes, whatever they contribute: noise is small.",),
    )
)
@dataclass(frozen=True)
class PredictionGapImportant(_Gap):
    """E |f(x) - f(x')|, where x' has noise in the k players with the largest |φ|: PGI.

    Attributes:
        fractions: k as shares of the players, rounded; the value is the mean over them, which for several is the area
            under the curve "gap" up to its width. The benchmark takes a quarter, and the mean over every k up to it.
        noise: what disturbs; normal with standard deviation 0.1 there.
        samples: copies for each k.
        score: what is meant by prediction: the probability of the target.
        groups: the players that are ranked and disturbed.

    Ties are ranked at random; parts["ties"] is their share. Flips of discrete features are not made.

    Source: Agarwal et al. (2022), prediction gap on important feature perturbation.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x @ torch.tensor([[4.0, 0.0], [0.1, 0.0]])), torch.ones(1, 2)
    >>> gap = PredictionGapImportant((0.5,), samples=20)
    >>> bool(gap(field, x, torch.tensor([[4.0, 0.1]])).values > gap(field, x, torch.tensor([[0.1, 4.0]])).values)
    True
    """

    important: ClassVar[bool] = True


@register(
    MetricCard(
        title="Prediction gap on unimportant feature perturbation (PGU)",
        paper=OPENXAI,
        intent="How far the prediction moves when all players but those a map calls important are disturbed.",
        direction=Direction.LOWER,
        range=(0.0, None),
        chance="what as many random players give",
        cost="samples times fractions, and f(x)",
        cautions=("A prediction that is sure of itself hardly moves, whatever is disturbed.",),
    )
)
@dataclass(frozen=True)
class PredictionGapUnimportant(_Gap):
    """E |f(x) - f(x')|, where x' has noise in all but the k players with the largest |φ|: PGU.

    Attributes:
        fractions: the shares k that are left as they are; the mean over them is the value.
        noise: what disturbs the rest.
        samples: copies for each k.
        score: whose move is measured.
        groups: the players.

    Ties and discrete features as for `PredictionGapImportant`, whose noise this has, draw by draw.

    Source: Agarwal et al. (2022).

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x @ torch.tensor([[4.0, 0.0], [0.0, 0.0]])), torch.ones(1, 2)
    >>> PredictionGapUnimportant((0.5,), samples=5)(field, x, torch.tensor([[1.0, 0.0]])).values
    tensor([0.], dtype=torch.float64)
    """

    important: ClassVar[bool] = False
