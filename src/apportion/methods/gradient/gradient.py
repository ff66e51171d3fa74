"""Gradient (saliency)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.sharing import AtX

CARD = Card(
    title="Gradient",
    paper=Paper(
        "Simonyan, Vedaldi, Zisserman",
        2013,
        "Deep inside convolutional networks: visualising image classification models and saliency maps",
        "arXiv:1312.6034",
    ),
    kind=Kind.SENSITIVITY,
    intent="The slope of the score in every input direction.",
    cost="1 forward, 1 backward",
    families=(Family.MODIFIED_GRADIENT,),
    claims=(
        Claim(Principle.DECISION_RELEVANCE, holds=True, source="Deng et al. 2025, Table VI"),
        Claim(Principle.MODEL_ROBUSTNESS, holds=False, source="Deng et al. 2025, Table VI, as gradient-based"),
    ),
    measured={
        Principle.SENSITIVITY: False,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: True,
    },
    differentiable=True,
    cautions=(
        "Zero where the score is saturated, however much the feature matters.",
        "On ReLU networks it jumps where the input crosses from one linear piece to the next.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class Gradient(Explainer):
    """The signed gradient ∂f/∂x, in units of the score per unit of x.

    Simonyan et al. 2013, section 3, show its magnitude, and its maximum over channels: take
    `.abs()` or `.channel_max_abs()` of the result for those.

    >>> import torch, apportion as ap
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.05, 1.50]]))
    >>> ap.Gradient()(ap.Field(model), torch.tensor([[100_000.0, 10_000.0]])).values
    tensor([[1.0500, 1.5000]])
    """

    def explain(self, q: Question) -> Attribution:
        value, grad = q.value_and_grad(q.x, q.owners)
        return q.attribution(self, grad, value=value)

    def asks(self, q: Question) -> Iterable[Hashable]:
        return (AtX(),)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1)
