"""Each principle's check accepts a method that satisfies it and rejects one that does not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import apportion as ap
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Kind, Paper, Principle
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.testing import PRINCIPLES, measure

CARD = Card("Wrong", Paper("Nobody", 2000, "Nothing", "nowhere"), Kind.SENSITIVITY, "Breaks a principle.", "1, 1")


@dataclass(frozen=True)
class InputItself(Explainer):
    """Returns the input, whatever the model."""

    card = CARD

    def explain(self, q: Question) -> Attribution:
        return q.attribution(self, q.x)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(0, 0, at_x=1)


@dataclass(frozen=True)
class FirstLayer(Explainer):
    """Sums the first layer's weights: two networks equal as functions get different values."""

    card = CARD

    def explain(self, q: Question) -> Attribution:
        weight = next(p for p in q.field.model.parameters() if p.ndim == 2)
        return q.attribution(self, weight.detach().sum(0).expand_as(q.x).clone())

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(0, 0, at_x=1)


EXAMPLES = [
    (Principle.COMPLETENESS, ap.IntegratedGradients(), ap.GradientTimesInput()),
    (Principle.SENSITIVITY, ap.IntegratedGradients(), ap.Gradient()),
    (Principle.DUMMY, ap.Gradient(), InputItself()),
    (Principle.LINEARITY, ap.SmoothGrad(samples=3), ap.SmoothGradSquared(samples=3)),
    (Principle.SYMMETRY, ap.IntegratedGradients(), ap.SmoothGrad(samples=3)),
    (Principle.IMPLEMENTATION_INVARIANCE, ap.Gradient(), FirstLayer()),
    (Principle.SHIFT_INVARIANCE, ap.Gradient(), ap.GradientTimesInput()),
]


@pytest.mark.parametrize(("principle", "good", "bad"), EXAMPLES, ids=[p.name for p, _, _ in EXAMPLES])
def test_told_apart(principle: Principle, good: Explainer, bad: Explainer) -> None:
    assert measure(good, principle)
    assert not measure(bad, principle)


def test_every_principle_is_covered() -> None:
    assert {p for p, _, _ in EXAMPLES} == set(PRINCIPLES)


def test_a_principle_without_check_says_so() -> None:
    with pytest.raises(ConfigError, match="no check for CONSISTENCY"):
        measure(ap.Gradient(), Principle.CONSISTENCY)


def test_equal_pair_is_equal_as_functions() -> None:
    a, b = ap.planted.equal_pair()
    x = torch.randn(50, 5, dtype=torch.float64)
    assert torch.allclose(a(x), b(x), rtol=1e-12)
