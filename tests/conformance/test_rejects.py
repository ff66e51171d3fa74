"""Every check rejects an explainer that breaks its promise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Kind, Paper, Principle
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.testing import CHECKS, ConformanceError, check_explainer

CARD = Card(
    title="Wrong",
    paper=Paper("Nobody", 2000, "Nothing", "nowhere"),
    kind=Kind.SENSITIVITY,
    intent="Breaks one promise.",
    cost="1 forward, 1 backward",
)


@dataclass(frozen=True)
class Honest(Explainer):
    """The gradient, from which the wrong ones differ in one thing."""

    card = CARD

    def explain(self, q: Question) -> Attribution:
        value, grad = q.value_and_grad(q.x, torch.arange(len(q)))
        return q.attribution(self, self.spoil(q, grad), value=value)

    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1)


@dataclass(frozen=True)
class MixesExamples(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad - grad.mean(0)


@dataclass(frozen=True)
class DependsOnChunks(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1 + 1e-9 * q.field.chunk)


@dataclass(frozen=True)
class UsesGlobalRandom(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad + 1e-6 * torch.randn_like(grad)


@dataclass(frozen=True)
class ChangesDtype(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.double()


@dataclass(frozen=True)
class TouchesModel(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        for p in q.field.model.parameters():
            p.requires_grad_(False)
        return grad


@dataclass(frozen=True)
class Costly(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        q.value(q.x, torch.arange(len(q)))
        return grad


@dataclass(frozen=True)
class ForgetsConfig(Honest):
    factor: float = 2.0
    hidden: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", self.factor + 1)

    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad * self.factor


@dataclass(frozen=True)
class ClaimsTotal(Explainer):
    card = dataclasses.replace(CARD, kind=Kind.SALIENCE, total="f(x)")

    def explain(self, q: Question) -> Attribution:
        _, grad = q.value_and_grad(q.x, torch.arange(len(q)))
        return q.attribution(self, grad, claimed_total=q.fx)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1, at_x=1)


@dataclass(frozen=True)
class ClaimsDerivative(Honest):
    card = dataclasses.replace(CARD, differentiable=True)

    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.detach() * sum(t.sum() for t in tree.leaves(q.x))


@dataclass(frozen=True)
class ClaimsPrinciple(Honest):
    card = dataclasses.replace(CARD, measured={Principle.SENSITIVITY: True})


@dataclass(frozen=True)
class DeniesPrinciple(Honest):
    card = dataclasses.replace(CARD, measured={Principle.DUMMY: False})


_shared: list[torch.Tensor] = []


@dataclass(frozen=True)
class SharesState(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        _shared.append(grad)
        return grad * len(_shared)


WRONG = [
    (MixesExamples(), "batch_independence"),
    (DependsOnChunks(), "chunk_invariance"),
    (UsesGlobalRandom(), "determinism"),
    (ChangesDtype(), "dtype_and_device"),
    (TouchesModel(), "no_trace"),
    (SharesState(), "threads"),
    (ForgetsConfig(), "config_round_trip"),
    (Costly(), "cost"),
    (ClaimsTotal(), "claims"),
    (ClaimsDerivative(), "differentiable"),
    (ClaimsPrinciple(), "principles"),
    (DeniesPrinciple(), "principles"),
]


@pytest.mark.parametrize(("explainer", "check"), WRONG, ids=[type(e).__name__ for e, _ in WRONG])
def test_rejected(explainer: Explainer, check: str) -> None:
    with pytest.raises(ConformanceError):
        CHECKS[check](explainer)


def test_every_check_has_something_to_reject() -> None:
    assert {c for _, c in WRONG} == set(CHECKS)


def test_the_honest_one_passes() -> None:
    check_explainer(Honest())
