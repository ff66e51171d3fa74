"""Average causal effects where they can be written down, and beside a slow twin with whole Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.parts.quadrature import Gauss, Midpoint

DOUBLE = torch.float64


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def correlated(d: int = 4, n: int = 40, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=DOUBLE)
    return 0.5 * torch.randn(n, d, generator=generator, dtype=DOUBLE) @ mix + 0.2


def test_linear_score() -> None:
    data = rows([-1.0, 0.0], [3.0, 4.0], [2.0, 1.0])  # ranges [-1, 3] and [0, 4]
    field = ap.Field(planted.Linear([2.0, -1.0], 5.0))
    found = ap.ACE(ap.FeatureMoments.fit(data))(field, rows([2.0, 3.0]))
    assert torch.allclose(found.values, rows([2.0, -1.0]), atol=1e-12)


def test_product_with_a_square() -> None:
    """f = x1 x2²: E[f | do(x1 = a)] = a (μ2² + σ2²), with nothing of the covariance of x1 and x2."""
    data = correlated(2)
    field = ap.Field(lambda x: x[:, 0] * x[:, 1] ** 2)
    ace = ap.ACE(ap.FeatureMoments.fit(data))
    q = field.bind(data[:3])
    a = torch.tensor([[0.7], [-0.4], [2.0]], dtype=DOUBLE)
    found = ace.expected(q, torch.tensor([0]), a).value
    want = a * (data[:, 1].mean() ** 2 + data[:, 1].var())
    assert torch.allclose(found, want, rtol=1e-12)
    naive = a * data[:, 1].mean() ** 2
    assert not torch.allclose(found, naive, rtol=1e-2)


def test_beside_whole_hessians() -> None:
    """The paper line by line: one feature, one value, one Hessian at a time."""
    data, net = correlated(), planted.dense_net(4)
    x = data[:2]
    mean, cov = data.mean(0), data.T.cov()
    low, high = data.amin(0), data.amax(0)
    want = torch.zeros(2, 4, dtype=DOUBLE)

    def one(z: Tensor) -> Tensor:
        return net(z[None])[0, 1]

    def expectation(i: int, alpha: Tensor) -> Tensor:
        mu, left = mean.clone(), cov.clone()
        mu[i] = alpha
        left[i], left[:, i] = 0, 0
        hessian = torch.autograd.functional.hessian(one, mu)
        assert isinstance(hessian, Tensor)
        return one(mu).detach() + 0.5 * torch.trace(hessian @ left)

    steps = (torch.arange(7, dtype=DOUBLE) + 0.5) / 7
    for i in range(4):
        base = torch.stack([expectation(i, low[i] + t * (high[i] - low[i])) for t in steps]).mean()
        for b in range(2):
            want[b, i] = expectation(i, x[b, i]) - base
    field, moments = ap.Field(net), ap.FeatureMoments.fit(data)
    found = ap.ACE(moments, Midpoint(7))(field, x, target=1)
    assert torch.allclose(found.values, want, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ap.ACE(moments, Midpoint(3))(field, x, target=1).values, want, rtol=1e-3)


def test_covariance_of_few_and_of_many_examples() -> None:
    for n in (3, 40):
        data = correlated(6, n)
        moments = ap.FeatureMoments.fit([data[:2], data[2:]])
        assert moments.factor.shape == (min(n, 6), 6)
        assert torch.allclose(moments.factor.T @ moments.factor, data.T.cov(), atol=1e-12)


def test_probes_are_unbiased_and_their_errors_hold() -> None:
    """Over 2,000 examples that differ in name alone: the mean is the exact value, the errors cover it."""
    data, net, n = correlated(), planted.dense_net(4), 2000
    field, moments = ap.Field(net), ap.FeatureMoments.fit(data)
    x = data[:1].expand(n, -1).contiguous()
    exact = ap.ACE(moments, Gauss(2))(field, x[:1], target=1).values
    found = ap.ACE(moments, Gauss(2), probes=16)(field, x, target=1, ids=range(n))
    error = found.parts["standard_error"]
    assert isinstance(found.values, Tensor)
    assert isinstance(error, Tensor)
    z = (found.values.mean(0) - exact[0]) / (found.values.std(0) / n**0.5)
    assert bool((z.abs() < 3.5).all())  # four features, 1 in 500
    told = (error**2).mean(0).sqrt() / found.values.std(0)
    assert bool(((told - 1).abs() < 0.1).all())


def test_outside_the_range_is_said() -> None:
    moments, field = ap.FeatureMoments.fit(correlated()), ap.Field(planted.dense_net(4))
    inside = ap.ACE(moments)(field, moments.mean[None], target=1)
    beyond = ap.ACE(moments)(field, moments.high[None] + 1, target=1)
    assert not inside.warnings
    assert any("outside the range" in w for w in beyond.warnings)


def test_mistakes_are_named() -> None:
    field, moments = ap.Field(planted.dense_net()), ap.FeatureMoments.fit(correlated())
    with pytest.raises(ConfigError, match="ACE without moments"):
        ap.ACE()(field, correlated(5), target=1)
    with pytest.raises(InputError, match="moments of 4 features for examples of 5"):
        ap.ACE(moments)(field, correlated(5), target=1)
    with pytest.raises(InputError, match="rows of features"):
        ap.ACE(moments)(ap.Field(planted.conv_net()), torch.zeros(1, 2, 8, 8, dtype=DOUBLE), target=1)
    with pytest.raises(ConfigError, match="at least 2"):
        ap.ACE(moments, probes=1)
    with pytest.raises(InputError, match="at least two"):
        ap.FeatureMoments.fit(correlated(n=1))
    with pytest.raises(InputError, match="rows of features"):
        ap.FeatureMoments.fit(torch.zeros(3, 2, 2))
    with pytest.raises(InputError, match="NaN"):
        ap.FeatureMoments.fit(torch.full((3, 2), torch.nan))
