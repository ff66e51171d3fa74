"""ReLU networks with weights set by hand, and per feature what is right: cancelling, interacting, absent, shattered.

The units are those of XAI-Units (Lee et al. 2025), written anew with exact Shapley values and dividends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.core.errors import InputError
from apportion.planted.functions import Points, Scores
from apportion.planted.problem import Planted, PlantedGame, away_from_zero, dividends, seeded, shapley_shares


@dataclass(frozen=True, eq=False, kw_only=True)
class HandWeighted(PlantedGame):
    """A ReLU network with weights set by hand; `truth` is its Shapley values.

    Attributes:
        published: the ground truth of XAI-Units, which decides otherwise who is given an interaction; it sums to the
            same.
    """

    published: Float[Tensor, "n d"]


def layers(*weights: tuple[Tensor, Tensor | None]) -> nn.Sequential:
    """Build linear layers of these weights and biases, with ReLUs in between, in float64."""
    made: list[nn.Module] = []
    for weight, bias in weights:
        out, inside = weight.shape
        linear = nn.Linear(inside, out, bias is not None, dtype=torch.float64, device="meta").to_empty(device="cpu")
        linear.requires_grad_(False).weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        made += [linear, nn.ReLU()]
    return nn.Sequential(*made[:-1]).eval()


def _blocks(features: int, block: Tensor) -> Tensor:
    """Place [k, 2 features] rows for feature pairs: a block's columns are x_i and its partner, for each i."""
    rows = torch.zeros(features, block.shape[1], 2 * features, dtype=torch.float64)
    at = torch.arange(features)
    rows[at, :, at] = block[:, :, 0]
    rows[at, :, features + at] = block[:, :, 1]
    return rows.flatten(0, 1)


def _with_partner(alone: Tensor, together: Tensor) -> tuple[Tensor, Tensor]:
    """Give Shapley values and dividends of Σ_i [a({x_i}) + a({x_i, partner})]; features first, partners behind."""
    n, k = alone.shape
    table = torch.zeros(n, 1 << (2 * k), dtype=torch.float64)
    for i in range(k):
        table[:, 1 << i] = alone[:, i]
        table[:, (1 << i) + (1 << (k + i))] = together[:, i]
    return torch.cat([alone + together / 2, together / 2], 1), table


_LARGE = 16.0
"""More than any w · x below, so that a unit it is taken from is off."""


def _values(generator: torch.Generator, examples: int, features: int) -> tuple[Tensor, Tensor]:
    x = away_from_zero(generator, examples, features).clamp(-2, 2)
    switch = torch.randint(2, (examples, features), generator=generator).double()
    switch[0, 0], switch[-1, 0] = 1, 0  # both cases, whatever is drawn
    return x, switch


def conflicting(features: int = 3, examples: int = 6, seed: int = 0) -> HandWeighted:
    """Σ_i w_i x_i (1 - c_i): each feature has a partner c_i, 0 or 1, that cancels it.

    Truth: Shapley values; a cancelled x_i gets w_i x_i / 2 and c_i as much against it. `published` gives w_i x_i and
    -w_i x_i. Gradients, gradient × input and integrated gradients from 0 give both nothing, since the units are off
    from the start.

    Args:
        features: without their partners, which are the last as many columns; at most 6.
        examples: n.
        seed: of weights, values and cancellations.

    Raises:
        InputError: too many features for a table of dividends.

    >>> p = conflicting()
    >>> torch.allclose(p.truth.sum(1), p.model(p.x)[:, 0]), torch.allclose(p.published.sum(1), p.truth.sum(1))
    (True, True)
    """
    _check(features)
    generator = seeded(seed)
    w = away_from_zero(generator, features).clamp(-2, 2)
    x, cancel = _values(generator, examples, features)
    block = torch.stack([torch.stack([w, -w], 1), torch.full((features, 2), -_LARGE, dtype=torch.float64)], 2)
    out = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(features)[None]
    truth, table = _with_partner(w * x, -w * x * cancel)
    return HandWeighted(
        model=layers((_blocks(features, block), None), (out, None)),
        x=torch.cat([x, cancel], 1),
        baseline=torch.zeros(1, 2 * features, dtype=torch.float64),
        truth=truth,
        dividends=table,
        published=torch.cat([w * x, -w * x * cancel], 1),
        target=0,
    )


def interacting(features: int = 3, examples: int = 6, seed: int = 0) -> HandWeighted:
    """Σ_i w_i(z_i) x_i: each feature has a partner z_i, 0 or 1, that chooses its weight.

    Truth: Shapley values; where z_i = 1, x_i gets the mean of both weights times x_i, and z_i half their difference
    times x_i. `published` gives x_i all and z_i nothing.

    Args:
        features: without their partners; at most 6.
        examples: n.
        seed: of weights, values and choices.

    Raises:
        InputError: so many features that dividends would fill the memory.

    >>> p = interacting()
    >>> torch.allclose(p.truth.sum(1), p.model(p.x)[:, 0])
    True
    """
    _check(features)
    generator = seeded(seed)
    low, high = away_from_zero(generator, 2, features).clamp(-2, 2)
    x, choose = _values(generator, examples, features)
    weight = torch.stack([low, -low, high, -high], 1)
    switch = torch.tensor([-_LARGE, -_LARGE, _LARGE, _LARGE], dtype=torch.float64).expand(features, 4)
    bias = torch.tensor([0, 0, -_LARGE, -_LARGE], dtype=torch.float64).repeat(features)
    out = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(features)[None]
    truth, table = _with_partner(low * x, (high - low) * x * choose)
    return HandWeighted(
        model=layers((_blocks(features, torch.stack([weight, switch], 2)), bias), (out, None)),
        x=torch.cat([x, choose], 1),
        baseline=torch.zeros(1, 2 * features, dtype=torch.float64),
        truth=truth,
        dividends=table,
        published=torch.cat([torch.where(choose == 1, high, low) * x, 0 * choose], 1),
        target=0,
    )


def pertinent_negative(features: int = 4, absent: int = 2, examples: int = 6, seed: int = 0) -> HandWeighted:
    """Σ_i w_i x_i + Σ_j v_j ReLU(1 - p_j): the last features speak by being absent, p_j = 0.

    Truth: w_i x_i and v_j (1 - p_j), from a baseline of 0 and of 1 for the p_j. From 0 everywhere an absent feature
    equals its baseline, and whatever multiplies by the difference gives it nothing.

    Args:
        features: those that speak by being present.
        absent: those that speak by being absent.
        examples: n.
        seed: of weights and values.

    Raises:
        InputError: more features than a table of dividends allows.

    >>> p = pertinent_negative()
    >>> torch.allclose(p.truth.sum(1), (p.model(p.x) - p.model(p.baseline))[:, 0])
    True
    """
    _check((features + absent + 1) // 2)
    generator = seeded(seed)
    w, v = away_from_zero(generator, features), 5 * away_from_zero(generator, absent)
    x, there = _values(generator, examples, max(features, absent))
    x, there = x[:, :features], there[:, :absent]
    eye = torch.eye(features, dtype=torch.float64)
    first = torch.block_diag(torch.cat([eye, -eye]), -torch.eye(absent, dtype=torch.float64))
    bias = torch.cat([torch.zeros(2 * features), torch.ones(absent)]).double()
    truth = torch.cat([w * x, v * (1 - there)], 1)
    table = torch.zeros(examples, 1 << (features + absent), dtype=torch.float64)
    table[:, [1 << i for i in range(features + absent)]] = truth
    return HandWeighted(
        model=layers((first, bias), (torch.cat([w, -w, v])[None], None)),
        x=torch.cat([x, there], 1),
        baseline=torch.cat([torch.zeros(1, features), torch.ones(1, absent)], 1).double(),
        truth=truth,
        dividends=table,
        published=truth,
        target=0,
    )


def shattered(features: int = 5, teeth: int = 32, steepness: float = 20.0, examples: int = 6, seed: int = 0) -> Planted:
    """Σ_i w_i x_i + a saw of low teeth on [0, 1]: the gradient is the saw's, up or down by which side x_i lies on.

    A tooth has the slopes ±steepness · |w_i| and the width 1 / teeth; x lies in the middle of its sides. Truth: the
    contribution of each feature, w_i x_i plus the saw's height, whose sign is that of w_i; half the gradients have the
    other.

    Args:
        features: d.
        teeth: on the unit interval.
        steepness: of the teeth, by the slope they are put on.
        examples: n, even.
        seed: of weights and points.

    >>> p = shattered()
    >>> torch.allclose(p.truth.sum(1), p.model(p.x)[:, 0])
    True
    """
    generator = seeded(seed)
    w = away_from_zero(generator, features)
    sides = 2 * teeth
    half = torch.randint(sides // 2, sides - 1, (examples // 2, features), generator=generator)
    at = torch.cat([half, half ^ 1])  # both sides of each tooth
    x = (at + 0.5) / sides
    x = x.double()
    # relu(x - k / sides): the slope changes by 2 K at each
    knots = torch.arange(sides, dtype=torch.float64) / sides
    turns = steepness * torch.where(torch.arange(sides) % 2 == 0, 2.0, -2.0).double()
    turns[0] = steepness
    first = torch.block_diag(*[torch.ones(sides, 1, dtype=torch.float64)] * features)
    out = (w.abs()[:, None] * turns + w[:, None] * (torch.arange(sides) == 0)).flatten()[None]
    model = layers((first, -knots.repeat(features)), (out, None))
    height = steepness * w.abs() * 0.5 / sides  # in the middle of a side, up or down
    return Planted(
        model=model, x=x, baseline=torch.zeros(1, features, dtype=torch.float64), truth=w * x + height, target=0
    )


@dataclass(frozen=True)
class Feature:
    """A literal: the feature itself."""

    index: int


@dataclass(frozen=True)
class Not:
    """Negation."""

    part: Formula


@dataclass(frozen=True)
class And:
    """True where both parts are."""

    left: Formula
    right: Formula


@dataclass(frozen=True)
class Or:
    """True where a part is."""

    left: Formula
    right: Formula


Formula = Feature | Not | And | Or


class Boolean(nn.Module):
    """A formula as a ReLU network of minima a - ReLU(a - b), maxima b + ReLU(a - b) and 1 - a, of values in [0, 1]."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Points) -> Scores:
        return self._value(self.formula, x)

    def _value(self, part: Formula, x: Tensor) -> Tensor:
        match part:
            case Feature(index):
                return x[:, index]
            case Not(inner):
                return 1 - self._value(inner, x)
            case And(left, right):
                a, b = self._value(left, x), self._value(right, x)
                return a - (a - b).relu()
            case Or(left, right):
                a, b = self._value(left, x), self._value(right, x)
                return b + (a - b).relu()


@dataclass(frozen=True, eq=False, kw_only=True)
class BooleanGame(PlantedGame):
    """A formula at assignments of its features, from False; `truth` is Shapley values.

    Attributes:
        sufficient: the minimal sets of features whose values decide the formula whatever the others are, in the
            order of `AllSubsets`.
        relevant: the features that are in any of these.
    """

    sufficient: Bool[Tensor, "n N"]
    relevant: Bool[Tensor, "n d"]


def boolean(formula: Formula, features: int | None = None) -> BooleanGame:
    """Plant a formula of AND, OR and NOT, at all assignments but all False, which is the baseline.

    Row s - 1 of `x` has bit i of s as feature i.

    Truth: Shapley values of v(S) = formula(x on S, False elsewhere), enumerated. Beside them the minimal sufficient
    reasons: for x1 AND x2 both if both are true, either if both are false.

    Args:
        formula: of `Feature`, `Not`, `And` and `Or`.
        features: how many, at most 8; by default up to the highest in the formula. Others are dummies.

    Raises:
        InputError: features beyond these.

    >>> from apportion.planted import And, Feature, Not, Or, boolean
    >>> p = boolean(And(Feature(0), Or(Feature(1), Not(Feature(2)))))
    >>> p.model(p.x).tolist()
    [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    >>> p.truth[-1], p.relevant[-1].tolist()        # (1, 1, 1): true because of x0 and x1
    (tensor([ 0.8333,  0.3333, -0.1667], dtype=torch.float64), [True, True, False])
    """
    used = _used(formula)
    count = max(used) + 1 if features is None else features
    if count > 8 or max(used) >= count or min(used) < 0:
        raise InputError(f"features {sorted(used)} of {count}", "0 to features - 1, at most 8 features")
    model = Boolean(formula)
    rows = torch.arange(1 << count)
    bits = ((rows[:, None] >> torch.arange(count)) & 1).double()
    x, baseline = bits[1:], bits[:1]
    table = dividends(model, x, baseline)
    value = model(bits)
    differ = rows[:, None] ^ rows  # where two assignments differ
    other = value[:, None] != value
    # a set decides where every assignment that agrees on it has the same value
    decides = ~((other[:, :, None] & ((differ[:, :, None] & rows) == 0)).any(1))
    smaller = ((rows[:, None] & rows) == rows) & (rows[:, None] != rows)  # [S, T]: T ⊂ S
    minimal = decides & ~(smaller.double() @ decides.double().T > 0).T
    return BooleanGame(
        model=model,
        x=x,
        baseline=baseline,
        truth=shapley_shares(table),
        dividends=table,
        sufficient=minimal[1:],
        relevant=(minimal[1:].double() @ bits) > 0,
    )


def _used(part: Formula) -> set[int]:
    match part:
        case Feature(index):
            return {index}
        case Not(inner):
            return _used(inner)
        case And(left, right) | Or(left, right):
            return _used(left) | _used(right)


def _check(features: int) -> None:
    if not 1 <= features <= 6:
        raise InputError(f"{features} pairs of features", "1 to 6: there are 4^pairs dividends")
