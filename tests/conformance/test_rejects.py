"""Every check rejects an explainer that breaks its promise."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Hashable
from dataclasses import dataclass

import pytest
import torch

import apportion as ap
from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Kind, Paper, Principle, Total
from apportion.core.errors import ConfigError
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
    card = dataclasses.replace(CARD, kind=Kind.SALIENCE, total=Total.VALUE)

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


DIFFERENCE = dataclasses.replace(CARD, kind=Kind.SALIENCE, total=Total.DIFFERENCE)


@dataclass(frozen=True)
class SumsItself(Explainer):
    """Claims the sum of its own values, whose gap is 0 by construction."""

    card = DIFFERENCE

    def explain(self, q: Question) -> Attribution:
        value, grad = q.value_and_grad(q.x, torch.arange(len(q)))
        values = tree.apply(torch.mul, grad, q.x)
        found = q.references(ap.baselines.Zero()) if self.refers else None
        return q.attribution(self, values, value=value, claimed_total=tree.total(values), references=found)

    @property
    def refers(self) -> bool:
        return True

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1, once=1)


@dataclass(frozen=True)
class SumsItselfWithoutReferences(SumsItself):
    @property
    def refers(self) -> bool:
        return False


@dataclass(frozen=True)
class SumsItselfAsValue(SumsItself):
    card = dataclasses.replace(DIFFERENCE, total=Total.VALUE)


@dataclass(frozen=True)
class SumsItselfAsOne(SumsItself):
    card = dataclasses.replace(DIFFERENCE, total=Total.ONE)


@dataclass(frozen=True)
class ClaimsAgainstItsCard(SumsItself):
    card = dataclasses.replace(DIFFERENCE, total=Total.NOTHING)


@dataclass(frozen=True)
class ClaimsNothingAgainstItsCard(Honest):
    card = DIFFERENCE


@dataclass(frozen=True)
class SumsItselfAroundABase(Explainer):
    card = dataclasses.replace(CARD, kind=None, total=Total.OF_BASE)
    base: Explainer = ap.GradientTimesInput()

    def explain(self, q: Question) -> Attribution:
        one = self.base.explain(q)
        return q.attribution(self, one.values, claimed_total=tree.total(one.values))

    def passes(self, q: Question | None = None) -> Passes:
        return self.base.passes(q)


@dataclass(frozen=True)
class Asks(Honest):
    """Asks a question of its own in place of the one it was given."""

    def explain(self, q: Question) -> Attribution:
        own = self.ask(q)
        _, grad = own.value_and_grad(own.x, torch.arange(len(own)))
        return q.attribution(self, grad)

    def ask(self, q: Question) -> Question:
        return q

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1, at_x=1)


@dataclass(frozen=True)
class ClassZero(Asks):
    def ask(self, q: Question) -> Question:
        return q.field.bind(q.x, target=0)


@dataclass(frozen=True)
class ResolvesTargetAgain(Asks):
    def ask(self, q: Question) -> Question:
        return q.field.bind(q.x)


@dataclass(frozen=True)
class TargetOfTheCopy(Honest):
    """Hands the target on to a call on a noisy copy, which without one chooses for itself."""

    def __call__(self, field: ap.Field, x: torch.Tensor, *, target: object = None, **options: object) -> Attribution:  # pyright: ignore[reportIncompatibleMethodOverride]
        generator = torch.Generator().manual_seed(0)
        noisy = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return super().__call__(field, noisy, target=target, **options)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class NoValue(Asks):
    def explain(self, q: Question) -> Attribution:
        value, grad = q.value_and_grad(q.x, torch.arange(len(q)))
        return q.attribution(self, grad, value=0 * value)


@dataclass(frozen=True)
class OneNumberAnExample(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.flatten(1).sum(1)


@dataclass(frozen=True)
class OneChannel(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.sum(1, keepdim=True)


@dataclass(frozen=True)
class Minus(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return -grad


@dataclass(frozen=True)
class Magnitude(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.abs()


@dataclass(frozen=True)
class AllZero(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return 0 * grad


@dataclass(frozen=True)
class UnsignedZero(AllZero):
    card = dataclasses.replace(CARD, signed=False)


@dataclass(frozen=True)
class MinusGradCAM(ap.GradCAM):
    def explain(self, q: Question) -> Attribution:
        a = super().explain(q)
        return dataclasses.replace(a, values=tree.apply(torch.neg, a.values))


@dataclass(frozen=True)
class EndsInFloat32(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.float().to(grad.dtype)


@dataclass(frozen=True)
class ScaledAfterFloat32(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return grad.float().to(grad.dtype) / 3


@dataclass(frozen=True)
class Raises(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        raise KeyError("planted mistake")


_shared: list[torch.Tensor] = []


@dataclass(frozen=True)
class SharesState(Honest):
    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        _shared.append(grad)
        return grad * len(_shared)


@dataclass(frozen=True)
class WritesToWhatIsShared(Honest):
    """Doubles in place what the next method of a list is given."""

    def asks(self, q: Question) -> list[Hashable]:
        return ["mine"]

    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return q.share("mine", lambda: grad).mul_(2)


@dataclass(frozen=True)
class NamesAlikeWhatDiffers(Honest):
    """Shares by a key that does not say what it is."""

    def asks(self, q: Question) -> list[Hashable]:
        return ["gradient"]

    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        return q.share("gradient", lambda: grad) + q.share("gradient", lambda: 2 * grad)


@dataclass(frozen=True)
class StaysAtTheExample(Honest):
    """Subtracts the user's example, also where a copy of it is asked about."""

    def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
        assert isinstance(q.x, torch.Tensor)
        assert isinstance(q.root.x, torch.Tensor)
        return grad * (q.x - q.root.x[q.in_root] + 1)


WRONG = [
    (MixesExamples(), "batch_independence"),
    (DependsOnChunks(), "chunk_invariance"),
    (UsesGlobalRandom(), "determinism"),
    (ChangesDtype(), "dtype_and_device"),
    (TouchesModel(), "no_trace"),
    (SharesState(), "threads"),
    (ForgetsConfig(), "config_round_trip"),
    (Costly(), "cost"),
    (WritesToWhatIsShared(), "company"),
    (NamesAlikeWhatDiffers(), "company"),
    (ClaimsTotal(), "claims"),
    (ClaimsDerivative(), "differentiable"),
    (ClaimsPrinciple(), "principles"),
    (DeniesPrinciple(), "principles"),
    (SumsItself(), "claims"),
    (SumsItselfWithoutReferences(), "claims"),
    (SumsItselfAsValue(), "claims"),
    (SumsItselfAsOne(), "claims"),
    (SumsItselfAroundABase(), "claims"),
    (ClaimsAgainstItsCard(), "claims"),
    (ClaimsNothingAgainstItsCard(), "claims"),
    (NoValue(), "claims"),
    (StaysAtTheExample(), "anew"),
    (ClassZero(), "target"),
    (ResolvesTargetAgain(), "target"),
    (TargetOfTheCopy(), "target"),
    (OneNumberAnExample(), "shape"),
    (OneChannel(), "shape"),
    (Minus(), "sign"),
    (Magnitude(), "sign"),
    (AllZero(), "sign"),
    (UnsignedZero(), "sign"),
    (MinusGradCAM(), "sign"),
    (EndsInFloat32(), "precision"),
    (ScaledAfterFloat32(), "precision"),
]


@pytest.mark.parametrize(("explainer", "check"), WRONG, ids=[type(e).__name__ for e, _ in WRONG])
def test_rejected(explainer: Explainer, check: str) -> None:
    with pytest.raises(ConformanceError):
        CHECKS[check](explainer)


def test_every_check_has_something_to_reject() -> None:
    assert {c for _, c in WRONG} == set(CHECKS)


def test_the_honest_one_passes() -> None:
    check_explainer(Honest())


@pytest.mark.parametrize("check", CHECKS)
def test_what_an_explainer_raises_is_a_finding(check: str) -> None:
    if check in ("principles",) or (check == "differentiable"):
        return  # nothing measured on its Card; refuses differentiable=True before it starts
    with pytest.raises(ConformanceError, match=r"Raises\(\).*") as found:
        CHECKS[check](Raises())
    if check != "threads":
        assert check in str(found.value)
    assert isinstance(found.value.__cause__, KeyError)


@dataclass(frozen=True)
class WithoutCard(Explainer):
    def explain(self, q: Question) -> Attribution:
        raise NotImplementedError

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1)


@pytest.mark.parametrize(
    ("explainer", "checks", "message"),
    [
        (WithoutCard(), None, "WithoutCard without a Card"),
        (ap.Gradient, None, r"the class Gradient as explainer(.|\n)*write Gradient\(\)"),
        (lambda q: q, None, "a function as explainer"),
        (ap.Gradient(), "cost", r"write checks=\['cost'\]"),
        (ap.Gradient(), ["cots"], r"no check named 'cots'(.|\n)*'cost'"),
        (ap.Gradient(), [3], "no check named 3"),
    ],
)
def test_misuse_is_told(explainer: object, checks: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(check_explainer)(explainer, checks)  # without the run-time type checker of these tests


def test_steps_are_not_low_precision() -> None:
    @dataclass(frozen=True)
    class Ranks(Honest):
        def spoil(self, q: Question, grad: torch.Tensor) -> torch.Tensor:
            return grad.flatten(1).argsort(1).argsort(1).reshape(grad.shape).to(grad)

    CHECKS["precision"](Ranks())
