"""Tetromino pictures are as the authors make them, and the class is where it is said to be."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError
from apportion.planted import Scenario
from apportion.planted.tetrominoes import _everywhere, _fixed


def test_alphas_are_those_of_the_published_settings() -> None:
    assert [s.value for s in Scenario] == [(0.18, 0.0125), (0.7, 0.1), (0.65, 0.2), (0.35, 0.15)]


def test_patterns() -> None:
    t, l = _fixed()  # noqa: E741
    assert t[1:4, 1:3].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert l[4:7, 5:7].tolist() == [[1, 0], [1, 0], [1, 1]]
    assert t.sum() == l.sum() == 4
    every = _everywhere()
    assert every.shape == (2, 168, 8, 8)
    assert (every.sum((2, 3)) == 4).all()
    assert len(torch.unique(every.flatten(0, 1).flatten(1), dim=0)) == 336


@pytest.mark.parametrize("scenario", Scenario)
def test_the_model_is_right_and_reads_what_it_is_said_to_read(scenario: Scenario) -> None:
    p = planted.tetrominoes(scenario, 600, seed=1)
    right = ((p.model(p.x) > 0) == (p.labels == 1)).double().mean()
    assert right > {Scenario.LINEAR: 0.86, Scenario.MULTIPLICATIVE: 0.9}.get(scenario, 0.93)
    sizes = p.truth.flatten(1).sum(1)
    assert (sizes == (4 if scenario is Scenario.MOVED else 8)).all()
    assert (p.own & ~p.truth).sum() == 0
    slope = ap.Gradient()(ap.Field(p.model), p.x[:40]).values[:, 0]
    if scenario is Scenario.MOVED:
        inside = (slope.abs() * p.truth[:40]).sum((1, 2)) / slope.abs().sum((1, 2))
        assert inside.median() > 0.5
    else:
        assert torch.equal((slope != 0), p.truth[:40])


@pytest.mark.parametrize("scenario", Scenario)
def test_odds_by_densities(scenario: Scenario) -> None:
    """The slow way: Gaussian densities of each class, averaged over all its patterns."""
    p = planted.tetrominoes(scenario, 20, seed=2)
    alpha = scenario.value[0]
    if scenario is Scenario.MOVED:
        kinds = list(_everywhere())
    elif scenario is Scenario.XOR:
        t, l = _fixed()  # noqa: E741
        kinds = [torch.stack([t + l, -t - l]), torch.stack([t - l, l - t])]
    else:
        kinds = [pattern[None] for pattern in _fixed()]
    found = []
    for patterns in kinds:
        if scenario is Scenario.MULTIPLICATIVE:
            window = 1 - alpha * patterns
            mean, deviation = torch.zeros_like(window), 8 * window / window.flatten(1).norm(dim=1)[:, None, None]
        else:
            mean = alpha * 8 * patterns / patterns.flatten(1).norm(dim=1)[:, None, None]
            deviation = torch.full_like(mean, 1 - alpha)
        density = torch.distributions.Normal(mean, deviation).log_prob(p.x).sum((2, 3))
        found.append(density.logsumexp(1) - torch.log(torch.tensor(float(len(patterns)))))
    assert torch.allclose(p.model(p.x), found[1] - found[0], atol=1e-9)


def test_correlated_noise() -> None:
    p = planted.tetrominoes(Scenario.LINEAR, 4000, seed=3, correlated=True, alpha=1e-6)
    assert abs(p.x.square().mean() - 1) < 0.1
    neighbors = (p.x[..., 3, 3] * p.x[..., 3, 4]).mean() / p.x[..., 3, 3].square().mean()
    assert neighbors > 0.9
    white = planted.tetrominoes(Scenario.LINEAR, 4000, seed=3, alpha=1e-6)
    assert abs((white.x[..., 3, 3] * white.x[..., 3, 4]).mean()) < 0.06
    assert torch.allclose(white.x.square().mean(), torch.tensor(1.0, dtype=torch.float64), atol=0.02)


def test_examples_do_not_depend_on_their_company() -> None:
    before = torch.random.get_rng_state()
    a, b = (planted.tetrominoes(Scenario.XOR, 10, seed=s) for s in (0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, planted.tetrominoes(Scenario.XOR, 10, seed=1).x)
    assert a.labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize("wrong", [{"count": 3}, {"count": 0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_wrong_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        planted.tetrominoes(**wrong)  # pyright: ignore[reportArgumentType]
