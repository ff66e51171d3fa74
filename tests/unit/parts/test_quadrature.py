"""Quadratures: weights, nodes, and the order they declare, measured."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.parts.quadrature import Gauss, Left, Midpoint, Quadrature, Right, Trapezoid

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
