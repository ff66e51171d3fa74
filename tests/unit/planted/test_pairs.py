"""Pairs are one function each, and tell apart the methods they are meant to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.planted.problem import Pair

PAIRS: list[Callable[[], Pair]] = [
    planted.same_function,
    planted.same_maximum,
    planted.same_relu,
    planted.same_but_shifted,
    lambda: planted.same_but_shifted(-1.3, seed=2, relu=True),
]


def both(p: Pair, make: Callable[[Tensor], ap.Explainer]) -> tuple[Tensor, Tensor]:
    first = make(p.baseline)(ap.Field(p.model), p.x, target=p.target)
    second = make(p.other_baseline)(ap.Field(p.other), p.other_x, target=p.target)
    return first.values, second.values


def ig(baseline: Tensor) -> ap.Explainer:
    return ap.IntegratedGradients(ap.baselines.Given(baseline), ap.quadrature.Midpoint(64))


@pytest.mark.parametrize("make", PAIRS)
def test_one_function(make: Callable[[], Pair]) -> None:
    p = make()
    shift = p.other_x - p.x
    assert torch.allclose(p.model(p.x), p.other(p.other_x), atol=1e-12)
    assert torch.allclose(p.model(p.baseline), p.other(p.other_baseline), atol=1e-12)
    elsewhere = torch.randn(50, p.x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    assert torch.allclose(p.model(elsewhere), p.other(elsewhere + shift[:1]), atol=1e-12)


@pytest.mark.parametrize("make", PAIRS)
def test_what_sees_the_function_only_cannot_tell_them_apart(make: Callable[[], Pair]) -> None:
    a, b = both(make(), ig)
    assert torch.allclose(a, b, atol=1e-9)
    a, b = both(make(), lambda _: ap.Gradient())
    assert torch.allclose(a, b, atol=1e-9)


def test_what_sees_the_network_can() -> None:
    p = planted.same_function()
    a, b = both(p, lambda _: ap.GuidedBackprop())
    assert not torch.allclose(a, b, atol=0.05)


def test_the_published_pair() -> None:
    p = planted.same_relu()
    assert p.truth is not None
    a, b = both(p, ig)
    assert torch.allclose(a, p.truth)
    assert torch.allclose(b, p.truth)
    a, b = both(p, lambda base: ap.DeepLIFT(ap.baselines.Given(base)))
    assert a.tolist() == [[1.5, -0.5]]
    assert b.tolist() == [[2.0, -1.0]]


def test_a_baseline_that_does_not_move_along() -> None:
    p = planted.same_but_shifted()
    field, other = ap.Field(p.model), ap.Field(p.other)
    for method in (ap.IntegratedGradients(), ap.GradientTimesInput()):
        a = method(field, p.x, target=p.target).values
        b = method(other, p.other_x, target=p.target).values
        assert not torch.allclose(a, b, atol=0.05)


@pytest.mark.parametrize("relu", [False, True])
def test_exchangeable_features_and_the_dummy(relu: bool) -> None:
    p = planted.exchangeable(relu=relu)
    assert torch.allclose(p.model(p.x + 0.0), p.model(p.x[:, [1, 0, 2, 3, 4]]))
    moved = p.x.clone()
    moved[:, 0] += 1.0
    assert torch.allclose(p.model(moved), p.model(moved[:, [1, 0, 2, 3, 4]]))
    values = ap.Shapley()(ap.Field(p.model), p.x, target=p.target).values
    assert torch.allclose(values[:, 0], values[:, 1])
    assert not torch.allclose(values[:, 0], values[:, 2])
    q = planted.with_dummy(relu=relu)
    slope = ap.Gradient()(ap.Field(q.model), q.x, target=q.target).values
    assert torch.equal((slope == 0).all(0), ~q.truth)


def test_seeds_alone_decide() -> None:
    before = torch.random.get_rng_state()
    a, b = planted.same_function(seed=5), planted.same_function(seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.model(a.x), b.model(b.x))
