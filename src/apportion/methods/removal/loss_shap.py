"""LossSHAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Need, Paper, Principle, Total
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.score import Loss
from apportion.parts.masks.sampled import COST, SAMPLED, OrderMethod

CARD = Card(
    title="LossSHAP",
    paper=Paper(
        "Lundberg, Erion, Chen, DeGrave, Prutkin, Nair, Katz, Himmelfarb, Bansal, Lee",
        2020,
        "From local explanations to global understanding with explainable AI for trees",
        "Nature Machine Intelligence 2, arXiv:1905.04610",
    ),
    kind=Kind.SALIENCE,
    intent="How much of an example's loss each player takes away, as Shapley values of minus the loss.",
    cost=COST,
    exact_cost=False,
    needs=frozenset({Need.LOSS}),
    families=(Family.PERTURBATION, Family.GAME, Family.REMOVAL),
    unjudged="Deng et al. 2025 place it among removals and judge it nowhere",
    measured={
        Principle.COMPLETENESS: False,
        Principle.SENSITIVITY: True,
        Principle.DUMMY: True,
        Principle.LINEARITY: False,
        Principle.SYMMETRY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: False,
    },
    total=Total.REDUCTION,
    cautions=(
        "It needs the true label: a player may help a wrong decision, and hurt the loss.",
        SAMPLED,
    ),
)


@register(CARD)
@dataclass(frozen=True)
class LossSHAP(OrderMethod):
    """Shapley values of v(S) = -ℓ(E[f(x_S, Z)], y), each example's loss under a fill Z of absent players.

    Positive lowers the loss; values sum to the loss of the empty input less that of the example, in units of the
    loss. Over several draws of the fill outputs are averaged before the loss is taken, as in SAGE, whose values are
    the mean of these over a data set. The rest is as for `Shapley`.

    Attributes:
        reduce: "mean_of_score" averages losses instead, which counts the spread of the fill as loss.

    Raises:
        ConfigError: a score that is no loss, or a budget for less than two draws.

    >>> import torch, apportion as ap
    >>> squared = ap.Loss(lambda outputs, y: (outputs - y) ** 2)
    >>> a = ap.LossSHAP()(ap.Field(lambda x: x.sum(1), squared), torch.tensor([[1.0, 2.0]]), target=torch.tensor([3.0]))
    >>> a.values.tolist()       # 9 without both, 4 and 1 without one, 0 with both
    [[3.0, 6.0]]
    """

    reduce: Literal["score_of_mean", "mean_of_score"] = "score_of_mean"

    def explain(self, q: Question) -> Attribution:
        check_loss(self, q)
        game = self.game(q)
        found = self.estimate(game)
        empty = game.value(torch.zeros(1, game.players, dtype=torch.bool))[:, 0]
        return self.answer(
            q,
            game,
            -found.values,
            standard_error=found.standard_error,
            claimed_total=empty - q.fx,
            parts=self.record(q, game, found),
        )

    def passes(self, q: Question | None = None) -> Passes:
        return self.at_most(q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(budget=254),)


def check_loss(explainer: Explainer, q: Question) -> None:
    """See that the score is a loss.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(q.field.score, Loss):
        raise ConfigError(
            f"{type(q.field.score).__name__} as score of {type(explainer).__name__}",
            "a loss, and labels as target",
            "write ap.Field(model, ap.Loss()) for cross-entropy; of other scores ask ap.Shapley",
        )
