"""SAGE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Family, Kind, Need, Paper, Total
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer, Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.tree import Tree
from apportion.methods.removal.loss_shap import check_loss
from apportion.parts.masks.estimators import Estimate
from apportion.parts.masks.explainer import elementwise
from apportion.parts.masks.fills import Baselines, Fill, Marginal
from apportion.parts.masks.groups import Elements
from apportion.parts.masks.sampled import OrderMethod

CARD = Card(
    title="SAGE",
    paper=Paper(
        "Covert, Lundberg, Lee",
        2020,
        "Understanding global feature contributions with additive importance measures",
        "NeurIPS 2020, arXiv:2004.00668",
    ),
    kind=Kind.SALIENCE,
    intent="How much of a model's loss over a data set each feature takes away, as Shapley values: one map for all.",
    cost="at most budget + 1 forward for each example and each row of the background",
    exact_cost=False,
    needs=frozenset({Need.LOSS}),
    families=(Family.PERTURBATION, Family.REMOVAL),
    unjudged="Deng et al. 2025 place it among removals and judge it nowhere",
    total=Total.REDUCTION,
    cautions=(
        "Values are of the examples given, and of the model: a feature the data need and the model ignores gets 0.",
        "Imputed from the marginal distribution, features are taken apart that belong together in the data.",
        "Standard errors are of the orders drawn; those of the choice of examples come on top.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class SAGE(OrderMethod):
    """Shapley values of v(S) = -mean over examples of ℓ(E[f(x_S, Z)], y); Covert, Lundberg, Lee 2020.

    One value per player for all examples together, on `Domain.GLOBAL`, in units of the loss: [1, ...] shaped as an
    example, or [1, players] for other groups than elements, which `a.spread()` lays on one example. Predictions are
    averaged over the background before the loss is taken. With the model's own outputs as target, values are Shapley
    effects, which explain their variance (Song, Nelson, Staum 2016). Every example plays as many orders, and the
    largest standard error over the range of the values tells when there are enough.

    Attributes:
        fill: rows Z; None takes the examples themselves.
        precision: the authors' threshold is 0.025; None spends the budget.

    Raises:
        ConfigError: a score other than a loss, or a budget too small for two draws.
        InputError: groups that differ from one example to the next, as superpixels do: no player is of all examples.

    >>> import torch, apportion as ap
    >>> x = torch.tensor([[-1.0, -2.0], [-1.0, 2.0], [1.0, -2.0], [1.0, 2.0]])
    >>> squared = ap.Loss(lambda outputs, y: (outputs - y) ** 2)
    >>> a = ap.SAGE()(ap.Field(lambda x: 3 * x[:, 0] + x[:, 1], squared), x, target=3 * x[:, 0] + x[:, 1])
    >>> a.values.tolist()       # w² Var(x)
    [[9.0, 4.0]]
    """

    fill: Fill | None = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    reduce: Literal["score_of_mean", "mean_of_score"] = "score_of_mean"
    budget: int = 512
    precision: float | None = 0.025

    def game(self, q: Question) -> Game:
        return super().game(q) if self.fill is not None else replace(self, fill=Marginal(q.x)).game(q)

    def explain(self, q: Question) -> Attribution:
        check_loss(self, q)
        game = self.game(q)
        each = isinstance(self.groups, Elements)
        labels = None if each else shared_labels(game.labels, q.x)
        found = self.estimate(game, pooled_precision)
        total = pooled(found)
        empty = game.value(torch.zeros(1, game.players, dtype=torch.bool))[:, 0]
        like = tree.leaves(q.x)[0]

        def placed(v: Tensor) -> Tree:
            v = v.to(like.device, like.dtype)
            return elementwise(v, q.x) if each else v

        game.warn_unchanged()
        parts = self.record(q, game, total)
        return q.attribution(
            self,
            placed(-total.values),
            domain=Domain.GLOBAL,
            groups=labels,
            claimed_total=(empty - q.fx).mean(0, keepdim=True).to(like.device, like.dtype),
            references=game.__dict__.get("references"),
            parts={**parts, "standard_error": placed(total.standard_error)},
        )

    def passes(self, q: Question | None = None) -> Passes:
        if self.fill is not None:
            return self.at_most(q)
        if q is None:
            raise ConfigError(
                "passes of SAGE without a question",
                "one, since the examples are the background",
                "write passes(field.bind(x, target=labels)), or give fill=",
            )
        return replace(self, fill=Marginal(q.x)).at_most(q)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(fill=Baselines(), budget=254),)


def shared_labels(labels: Tree, like: Tree) -> Tree:
    """Give the labels of one example, which must be those of all.

    Raises:
        InputError: they differ.
    """
    if any(bool((label != label[:1]).any()) for label in tree.leaves(labels)):
        raise InputError(
            "groups that differ from one example to the next, for values of all examples together",
            "the same elements in a group, whatever the example",
            "give ap.groups.Squares, Columns or Labels; of groups of each example's own, ask ap.LossSHAP",
        )
    return tree.apply(lambda label, x: label[:1].expand(1, *x.shape[1:]), labels, like)


def pooled(found: Estimate) -> Estimate:
    """Average estimates over examples, whose draws are independent: [1, P]."""
    error = found.standard_error.square().sum(0, keepdim=True).sqrt() / len(found.values)
    if found.freedom is None:
        return Estimate(found.values.mean(0, keepdim=True), error)
    each = found.standard_error.square().square() / found.freedom  # Welch and Satterthwaite
    freedom = found.standard_error.square().sum(0, keepdim=True).square() / each.sum(0, keepdim=True)
    bounded = None if found.bounded is None else found.bounded.any(0, keepdim=True)
    return Estimate(found.values.mean(0, keepdim=True), error, None, freedom.nan_to_num(torch.inf, torch.inf), bounded)


def pooled_precision(found: Estimate) -> Float[Tensor, " B"]:
    """Judge every example by the precision of the mean."""
    return pooled(found).precision.expand(len(found.values))
