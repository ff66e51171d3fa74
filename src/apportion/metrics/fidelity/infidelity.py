"""Infidelity: how far a map is from telling what perturbations do to the score."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Kind, Paper
from apportion.core.explainer import Passes
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.fidelity.perturbations import (
    GaussianPerturbation,
    NoisyBaseline,
    Perturbation,
    SquareRemoval,
    Taken,
)
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, key_of, register, rounding
from apportion.metrics.scores import Direction

CARD = MetricCard(
    title="Infidelity",
    paper=Paper(
        "Yeh, Hsieh, Suggala, Inouye, Ravikumar",
        2019,
        "On the (in)fidelity and sensitivity of explanations",
        "NeurIPS",
    ),
    intent="Mean squared error of a map that is read as a linear forecast of what perturbations do to the score.",
    direction=Direction.LOWER,
    range=(0.0, None),
    chance='no bound; parts["of zeros"] is what a map of zeros gets',
    cost="perturbations, and f(x)",
    cautions=(
        "Without the optimal scale it punishes maps in other units, however right their proportions.",
        "With it, a map and its negative score alike.",
        "Large perturbations favor maps in units of the score, small ones slopes: compare under one only.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class Infidelity(Metric):
    """E_I[(Iᵀ Φ - (f(x) - f(x - I)))²] over perturbations I, in squared units of the score.

    What Iᵀ Φ is depends on what the map says it is. A sensitivity is Φ itself, a slope per unit of input, and meets I.
    A salience φ is in units of the score, a slope times the way x - x' from the baseline, and meets I / (x - x'), which
    is 1 where an element is removed: the binary I of the paper. Where x is at the baseline φ has nothing to give, and
    that quotient is taken as 0. So an exact map of a linear score has infidelity 0 in either form. A map with one
    channel for several is the slope of each of them, or, as a salience, what all have together.

    Attributes:
        perturbation: how I is drawn: `NoisyBaseline()`, `SquareRemoval()` or `GaussianPerturbation(sigma)`.
        optimal_scale: multiply the map, example by example, by the β = E[IᵀΦ Δ] / E[(IᵀΦ)²] that suits it best, as the
            authors' code always does; their definition has no such factor. For a forecast of zeros β is 0.

    parts["scale"] is β, parts["scaled"] the infidelity with it, and parts["of zeros"] that of a map of zeros, E[Δ²].

    Source: Yeh et al. (2019), section 2.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x @ torch.tensor([1.0, -2.0])), torch.ones(1, 2)
    >>> found = Infidelity(NoisyBaseline(samples=20))(field, x, ap.Gradient())
    >>> bool(found.values < 1e-10), bool(found.parts["of zeros"] > 0.5)
    (True, True)
    """

    perturbation: Perturbation = NoisyBaseline()
    optimal_scale: bool = False

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Perturb, forecast, compare."""
        salience = subject.attribution(q).kind is Kind.SALIENCE
        phi, fx, count = subject.map(q), q.fx.detach(), self.perturbation.count(q)
        forecast: list[Tensor] = []

        def drawn() -> Iterator[tuple[Taken, Tensor]]:
            for draw, owner in q.grid(count, "infidelity"):
                taken = self.perturbation(q, owner, draw, salience)
                forecast.append(_forecast(taken.amount, phi, owner, salience))
                yield taken, owner

        def falls(_: Question) -> Tensor:
            every = [tree.wide(fx)[o] - tree.wide(q.value(taken.rows, o).detach()) for taken, o in drawn()]
            return torch.cat(every)

        fall = q.once(("falls", key_of(self.perturbation)), falls)
        if not forecast:  # the scores are there, by another map
            deque(drawn(), maxlen=0)
        told, found = (each.reshape(count, -1).T for each in (torch.cat(forecast), fall))
        square = told.square().mean(1)
        scale = torch.where(square > 0, (told * found).mean(1) / square, 0)
        plain, scaled = ((s[:, None] * told - found).square().mean(1) for s in (torch.ones_like(scale), scale))
        zeros = found.square().mean(1)
        least = (rounding(q) / 8) ** 2 * (square + zeros + tree.wide(fx).square())  # what methods would be ranked by
        least = torch.minimum(least, zeros / 1e6)  # where falls are little but rounding no map is exact by it
        plain, scaled = (each.masked_fill(each <= least, 0.0) for each in (plain, scaled))
        return Found(
            scaled if self.optimal_scale else plain, parts={"scale": scale, "scaled": scaled, "of zeros": zeros}
        )

    def passes(self, q: Question) -> Passes:
        """Each perturbation once, whatever the number of maps."""
        return self.perturbation.baseline.added_to(Passes(0, 0, 1, once=self.perturbation.count(q)), scored=False)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """One of each kind."""
        return (
            cls(NoisyBaseline(samples=7)),
            cls(SquareRemoval((5, 7), samples=6), optimal_scale=True),
            cls(SquareRemoval((6,))),
            cls(GaussianPerturbation(0.1, 5)),
        )


def _forecast(weights: Tree, phi: Tree, owner: Owner, salience: bool) -> Float[Tensor, " R"]:
    def meet(weight: Tensor, values: Tensor) -> Tensor:
        if values.shape[1:] != weight.shape[1:]:  # one channel for all
            weight = weight.mean(1, keepdim=True) if salience else weight.sum(1, keepdim=True)
        return tree.wide((weight * values[owner]).flatten(1)).sum(1)

    return tree.total(tree.apply(meet, weights, phi))
