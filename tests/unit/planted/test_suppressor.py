"""The suppressor says nothing of the class, the best classifier needs it, and patterns see through it."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError

SETTINGS = [(0.8, 1.0, 1.5), (-0.5, 2.0, 0.7), (0.0, 1.0, 1.0)]


@pytest.mark.parametrize(("c", "s1", "s2"), SETTINGS)
def test_weights_are_the_best_linear_ones(c: float, s1: float, s2: float) -> None:
    p = planted.suppressor(c, s1, s2)
    wanted = torch.linalg.solve(p.covariance, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.allclose(p.weight, wanted / wanted.norm())
    assert torch.isclose(p.weight[1] / p.weight[0], torch.tensor(-c * s1 / s2, dtype=torch.float64))
    assert torch.allclose(p.model(p.x)[:, 0], p.x @ p.weight)
    # x has these moments exactly, so least squares on it finds the direction exactly
    found = torch.linalg.lstsq(p.x, p.labels[:, None]).solution[:, 0]
    assert torch.allclose(found / found.norm(), p.weight, atol=1e-10)
    assert torch.allclose(p.x.T @ p.labels / len(p.x), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)
    noise = p.x - p.labels[:, None] * torch.tensor([1.0, 0.0])
    assert torch.allclose(noise.T @ noise / len(p.x), p.covariance)


def test_who_calls_the_suppressor_important() -> None:
    p = planted.suppressor()
    field = ap.Field(p.model)
    for method in (ap.Gradient(), ap.IntegratedGradients(), ap.Shapley(), ap.Occlusion()):
        size = method(field, p.x, target=0).values.abs().mean(0)
        assert size[1] > 0.2 * size[0], method
    estimated = ap.rules.Patterns.fit(field, p.x, ap.rules.LinearPatterns())
    values = ap.PatternNet(estimated)(field, p.x, target=0).values
    assert values[:, 1].abs().max() < 1e-10 * values[:, 0].abs().min()
    assert torch.allclose(p.pattern / p.pattern[0], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)


def test_conditional_shapley_values_are_not_zero_for_it_either() -> None:
    """E[f | x2] = 0, but E[f | x1, x2] - E[f | x1] = w2 (x2 - E[x2 | x1]) is not; its mean over the data is."""
    p = planted.suppressor()
    slope = (p.x[:, 0] @ p.x[:, 1]) / (p.x[:, 0] @ p.x[:, 0])  # the best linear guess of x2 from x1
    alone = p.weight[0] * (p.covariance[0, 1] / p.covariance[1, 1]) * p.x[:, 1] + p.weight[1] * p.x[:, 1]
    assert alone.abs().max() < 1e-12
    joined = p.weight[1] * (p.x[:, 1] - slope * p.x[:, 0])
    assert joined.abs().mean() > 0.1
    assert abs(joined.mean()) < 1e-12


def test_draws() -> None:
    p = planted.suppressor()
    before = torch.random.get_rng_state()
    x, y = p.draw(20000, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(p.draw(20000, seed=1)[0], x)
    noise = x - y[:, None] * torch.tensor([1.0, 0.0])
    assert torch.allclose(noise.T @ noise / 20000, p.covariance, atol=0.08)
    assert abs((x[:, 1] * y).mean()) < 0.03
    # the suppressor helps: w is right more often than feature 0 alone
    with_it = ((x @ p.weight).sign() == y).double().mean()
    assert with_it > (x[:, 0].sign() == y).double().mean() + 0.05


@pytest.mark.parametrize("wrong", [{"c": 1.0}, {"s1": 0.0}, {"s2": -1.0}, {"examples": 7}, {"examples": 4}])
def test_wrong_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        planted.suppressor(**wrong)  # pyright: ignore[reportArgumentType]
