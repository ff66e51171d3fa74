"""What values of games say of their own doubt: few draws, draws that do not vary, fills that draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap

DOUBLE = torch.float64
ORDERS = ap.samplers.Permutations()


def largest(x: Tensor) -> Tensor:
    return x.amax(1)


def curved(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(5)
    inner, outer = (torch.randn(*shape, generator=g, dtype=DOUBLE) for shape in ((12, 8), (8,)))
    return torch.tanh(x @ inner) @ outer


def said(a: Any, what: str) -> bool:
    return any(what in w for w in a.warnings)


@pytest.mark.parametrize("method", [ap.Shapley(), ap.Banzhaf(budget=200)])
def test_a_rare_event_has_a_bound(method: Any) -> None:
    """Of a hundred equal players, whoever comes first has all: most are never seen to add anything."""
    a = method(ap.Field(largest), torch.ones(30, 100), ids=range(30))
    error, true = a.parts["standard_error"], 0.01 if isinstance(method, ap.Shapley) else 0.5**99
    assert bool((error > 0).all())
    assert float(((a.values - true).abs() <= 1.96 * error).double().mean()) > 0.95
    assert said(a, "rule of three")
    if isinstance(method, ap.Shapley):  # 20 orders: seen in one of them, or 1.5 times the range, 1, over 20
        never = a.values == 0
        torch.testing.assert_close(error[never], torch.full_like(error[never], 1.5 / 20))


def test_bounds_by_hand() -> None:
    """An additive game adds x each time: the gains' range with 0 is 9. All orders of two are one family."""
    x = torch.arange(1.0, 10.0, dtype=DOUBLE)[None]
    a = ap.Shapley(sampler=ORDERS, budget=80)(ap.Field(lambda x: x.sum(1)), x)
    torch.testing.assert_close(a.values, x)
    torch.testing.assert_close(a.parts["standard_error"], torch.full_like(x, 1.5 * 9 / 10))
    both = ap.Shapley(sampler=ap.samplers.Permutations(antithetic=True), budget=50)
    pair = both(ap.Field(lambda x: x.prod(1)), x[:, :2])
    assert not pair.parts["standard_error"].any()
    constant = ap.Shapley(sampler=ORDERS)(ap.Field(lambda x: x.sum(1) * 0 + 2), x)
    assert not constant.parts["standard_error"].any()


@pytest.mark.parametrize(("orders", "t"), [(2, 12.706), (5, 2.776)])
def test_few_orders_need_students_t(orders: int, t: float) -> None:
    x, field = torch.ones(1, 12, dtype=DOUBLE), ap.Field(curved)
    true = ap.Shapley(budget=5000)(field, x).values
    a = ap.Shapley(sampler=ORDERS, budget=11 * orders)(field, x.expand(150, -1), ids=range(150))
    off, error = (a.values - true).abs(), a.parts["standard_error"]
    assert a.parts["degrees_of_freedom"].tolist() == [orders - 1] * 150
    assert float((off <= 1.96 * error).double().mean()) < 0.9
    assert 0.92 < float((off <= t * error).double().mean()) < 0.975
    assert said(a, "Student's t")


def test_enough_orders_and_exact_values_are_not_warned_of() -> None:
    x, field = torch.ones(2, 12, dtype=DOUBLE), ap.Field(curved)
    for method in (ap.Shapley(sampler=ORDERS, budget=11 * 20), ap.Banzhaf(budget=200), ap.KernelSHAP(budget=200)):
        a = method(field, x, ids=[0, 1])
        assert not a.warnings
        assert bool((a.parts["degrees_of_freedom"] >= 19).all())
    exact = ap.Shapley(budget=5000)(field, x)
    assert exact.parts["degrees_of_freedom"].tolist() == [torch.inf] * 2
    assert not exact.warnings


def test_sage_pools_degrees_of_freedom() -> None:
    """By Welch and Satterthwaite between those of one example and of all together."""
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    field = ap.Field(curved, ap.Loss(lambda outputs, y: (outputs - y) ** 2))
    sage = ap.SAGE(fill=ap.fills.Baselines(), sampler=ORDERS, budget=44, precision=None)
    a = sage(field, x, target=torch.zeros(6, dtype=DOUBLE), ids=range(6))
    assert 3 <= float(a.parts["degrees_of_freedom"]) <= 18
    assert said(a, "Student's t")


SQUARED = ap.Loss(lambda outputs, y: (outputs - y) ** 2)
NOISE = ap.fills.FreshNoise(1.0)


@pytest.mark.parametrize(
    "method",
    [
        ap.Shapley(fill=NOISE),
        ap.KernelSHAP(fill=NOISE),
        ap.Banzhaf(fill=NOISE),
        ap.Semivalue(fill=NOISE),
        ap.LossSHAP(fill=NOISE),
        ap.SAGE(fill=NOISE),
        ap.Shapley(fill=ap.fills.Baselines(ap.baselines.Several((ap.baselines.Zero(), ap.baselines.Noise())))),
    ],
)
def test_values_of_a_random_fill_are_given_its_draw(method: Any) -> None:
    x = torch.ones(1, 4, dtype=DOUBLE)
    field = ap.Field(lambda x: x.sum(1) ** 2, SQUARED if isinstance(method, ap.LossSHAP | ap.SAGE) else ap.Logit())
    target = torch.zeros(1, dtype=DOUBLE) if field.score is SQUARED else None
    a, b = (method(field, x, target=target, seed=seed) for seed in (0, 1))
    assert float((a.values - b.values).abs().max()) > 0.5
    assert said(a, "given this draw of the fill")


def test_which_fills_are_random() -> None:
    fills, base = ap.fills, ap.baselines
    rows = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for fill in (NOISE, fills.NoisyLinear(), fills.ConditionalGaussian.fit(rows, side=3, patches=40)):
        assert fill.random
    for fill in (fills.Baselines(), fills.Marginal(rows), fills.NoisyLinear(noise=0.0), fills.Conditional(rows)):
        assert not fill.random
    assert base.UniformNoise().random
    assert base.Data(rows).random
    assert not base.Blurred(2).random


def test_sufficiency_by_a_table_has_no_errors_of_draws() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    field, mask = ap.Field(lambda x: x.prod(1) - 0.5, ap.Decision()), torch.tensor([[True, False]])
    table = ap.sufficiency(field, rows[3:], mask, fill=ap.fills.Conditional(rows))
    draws = ap.sufficiency(field, rows[3:], mask, fill=ap.fills.Marginal(rows))
    assert table.draws == draws.draws == 4
    assert table.sufficiency.tolist() == [[0.5]]
    assert table.standard_errors is None
    assert draws.standard_errors is not None
