"""Quadratures: weights, nodes, and the order they declare, measured."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.core.errors import ConfigError
from apportion.parts.quadrature import Adaptive, Gauss, Left, Midpoint, MonteCarlo, Power, Quadrature, Right, Trapezoid

KINDS = [Gauss, Midpoint, Trapezoid, Left, Right]


def all_rules() -> list[Quadrature]:
    return [kind(n) for kind in KINDS for n in range(1, 65) if not (kind is Trapezoid and n == 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_nodes(kind: type[Quadrature]) -> None:
    for rule in (r for r in all_rules() if type(r) is kind):
        t, w = rule.rule()
        assert t.dtype == w.dtype == torch.float64
        assert len(t) == len(w) == rule.n
        assert abs(math.fsum(w.tolist()) - 1) <= 1e-15, rule
        assert abs(float(w.sum()) - 1) <= 1e-15, rule
        assert bool((w > 0).all())
        assert bool((t[1:] > t[:-1]).all())
        assert float(t[0]) >= 0
        assert float(t[-1]) <= 1


def panels(rule: Quadrature, f, m: int) -> float:
    """Apply a rule on m equal panels of [0, 1]."""
    t, w = rule.rule()
    at = (torch.arange(m, dtype=torch.float64)[:, None] + t) / m
    return float((w * f(at)).sum() / m)


def smooth(t: Tensor) -> Tensor:
    return (3 * t).exp() * (1 + t).log()


def exact() -> float:
    t, w = np.polynomial.legendre.leggauss(100)
    return float((w * smooth(torch.from_numpy((t + 1) / 2)).numpy()).sum() / 2)


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (Gauss(1), (16, 32, 64, 128)),
        (Gauss(2), (8, 16, 32, 64)),
        (Gauss(3), (4, 8, 16)),
        (Gauss(4), (3, 4, 6, 8)),
        (Midpoint(1), (16, 32, 64, 128)),
        (Midpoint(5), (4, 8, 16, 32)),
        (Trapezoid(2), (16, 32, 64, 128)),
        (Trapezoid(6), (4, 8, 16, 32)),
        (Left(1), (64, 128, 256, 512)),
        (Left(4), (64, 128, 256)),
        (Right(1), (64, 128, 256, 512)),
        (Right(4), (64, 128, 256)),
        (Power(base=Midpoint(4)), (16, 32, 64, 128)),
        (Power(base=Midpoint(4), exponent=3), (16, 32, 64, 128)),
        (Power(base=Trapezoid(5)), (64, 128, 256, 512)),
        (Power(base=Gauss(2)), (8, 16, 32, 64)),
        (Power(base=Gauss(4)), (4, 8, 16)),
    ],
    ids=str,
)
def test_measured_order_is_the_declared_one(rule: Quadrature, sizes: tuple[int, ...]) -> None:
    errors = [abs(panels(rule, smooth, m) - exact()) for m in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(-slope - rule.order) < 0.06 * rule.order, (-slope, errors)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16])
def test_gauss_is_exact_for_monomials_up_to_its_degree(n: int) -> None:
    t, w = Gauss(n).rule()
    for power in range(2 * n):
        assert abs(float((w * t**power).sum()) - 1 / (power + 1)) < 1e-15 * (1 + power), power
    assert abs(float((w * t ** (2 * n)).sum()) - 1 / (2 * n + 1)) > 1e-12 or n > 8


@pytest.mark.parametrize(
    ("rule", "degree"),
    [(Midpoint(4), 1), (Trapezoid(4), 1), (Left(4), 0), (Right(4), 0), (Midpoint(1), 1)],
    ids=str,
)
def test_degree_of_exactness(rule: Quadrature, degree: int) -> None:
    t, w = rule.rule()
    for power in range(degree + 1):
        assert abs(float((w * t**power).sum()) - 1 / (power + 1)) < 1e-15
    assert abs(float((w * t ** (degree + 1)).sum()) - 1 / (degree + 2)) > 1e-3


def test_a_cubic_needs_two_gauss_nodes() -> None:
    def cubic(t: Tensor) -> Tensor:
        return 7 * t**3 - 5 * t**2 + 2 * t - 11

    assert abs(panels(Gauss(2), cubic, 1) - (7 / 4 - 5 / 3 + 1 - 11)) < 1e-14


def test_ends() -> None:
    assert float(Left(4).rule()[0][0]) == 0
    assert float(Right(4).rule()[0][-1]) == 1
    assert [float(t) for t in Trapezoid(2).rule()[0]] == [0, 1]
    for rule in (Gauss(64), Midpoint(64)):
        assert float(rule.rule()[0][0]) > 0
        assert float(rule.rule()[0][-1]) < 1


def test_powers_crowd_near_the_baseline_and_refuse_what_has_no_fixed_nodes() -> None:
    t, w = Power(base=Midpoint(10), exponent=3).rule()
    assert int((t < 0.1).sum()) == 5
    assert abs(float(w.sum()) - 1) < 1e-15
    assert torch.equal(torch.stack(Power(base=Gauss(5), exponent=1).rule()), torch.stack(Gauss(5).rule()))
    for bad in (lambda: Power(base=MonteCarlo(4)), lambda: Power(exponent=0), lambda: Power(base=Power())):
        with pytest.raises(ConfigError, match="exponent"):
            bad()


@pytest.mark.parametrize(
    "options", [{"tolerance": -0.1}, {"map_tolerance": -1.0}, {"first": 2}, {"first": 20, "max_passes": 10}]
)
def test_adaptive_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="Adaptive"):
        Adaptive(**options)  # pyright: ignore[reportArgumentType]


def test_rules_without_fixed_nodes_say_so() -> None:
    for rule in (MonteCarlo(3), Adaptive()):
        with pytest.raises(ConfigError, match="rule"):
            rule.rule()


@pytest.mark.parametrize("exponent", [2, 3])
def test_powers_converge_in_n_as_their_base(exponent: int) -> None:
    sizes = (20, 40, 80, 160)
    errors = [abs(panels(Power(base=Midpoint(n), exponent=exponent), smooth, 1) - exact()) for n in sizes]
    assert abs(-np.polyfit(np.log(sizes), np.log(errors), 1)[0] - 2) < 0.12
