"""What the planted functions say of themselves, by exact enumeration and by the methods it is said of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.planted.problem import Planted, PlantedGame, shapley_shares


def explained(method: ap.Explainer, p: Planted) -> Tensor:
    values = method(ap.Field(p.model), p.x, target=p.target).values
    assert isinstance(values, Tensor)
    return values


def from_baseline(p: Planted) -> ap.baselines.Given:
    return ap.baselines.Given(p.baseline)


def fill(p: Planted) -> ap.fills.Baselines:
    return ap.fills.Baselines(from_baseline(p))


EXACT = ap.quadrature.Gauss(8)  # polynomials of degree 15


def near(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


MAKERS: list[Callable[..., Planted]] = [planted.linear, planted.additive, planted.multilinear, planted.homogeneous]


@pytest.mark.parametrize("make", MAKERS)
def test_seeds_alone_decide(make: Callable[..., Planted]) -> None:
    before = torch.random.get_rng_state()
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.truth, again.truth)
    assert torch.equal(first.model(first.x), again.model(again.x))
    assert not torch.equal(first.truth, other.truth)
    with pytest.raises(AttributeError):
        first.truth = other.truth  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("make", [planted.linear, planted.additive, planted.multilinear])
@pytest.mark.parametrize("seed", [0, 1])
def test_truth_is_the_shapley_values_by_enumeration(make: Callable[..., Planted], seed: int) -> None:
    p = make(seed=seed)
    terms = planted.dividends(p.model, p.x, p.baseline)
    assert near(shapley_shares(terms), p.truth)
    if isinstance(p, PlantedGame):
        assert near(terms, p.dividends)
    else:  # nothing but single features
        several = torch.tensor([bin(s).count("1") > 1 for s in range(terms.shape[1])])
        assert terms[:, several].abs().max() < 1e-12
    assert near(explained(ap.Shapley(fill=fill(p)), p), p.truth)


@pytest.mark.parametrize("make", [planted.linear, planted.additive, planted.multilinear])
def test_integrated_gradients_give_the_truth(make: Callable[..., Planted]) -> None:
    p = make()
    assert near(explained(ap.IntegratedGradients(from_baseline(p), EXACT), p), p.truth)


def test_linear() -> None:
    p = planted.linear()
    weight = p.model.get_buffer("weight")
    assert near(explained(ap.Gradient(), p), weight.expand_as(p.x))
    for method in (ap.Occlusion(fill=fill(p)), ap.DeepLIFT(from_baseline(p))):
        assert near(explained(method, p), p.truth)


def test_gradient_times_input_misses_the_additive_truth_and_occlusion_the_multilinear() -> None:
    bent, mixed = planted.additive(), planted.multilinear()
    slope = explained(ap.Gradient(), bent)
    assert not near(slope * (bent.x - bent.baseline), bent.truth, 0.1)
    assert near(explained(ap.Occlusion(fill=fill(bent)), bent), bent.truth)
    whole = explained(ap.Occlusion(fill=fill(mixed)), mixed)
    assert not near(whole, mixed.truth, 0.1)
    member = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
    assert near(whole, mixed.dividends @ member.double())


def test_order_of_a_multilinear_function() -> None:
    p = planted.multilinear(order=2, from_zero=True)
    triples = [7, 11, 13, 14, 15]
    assert (p.dividends[:, triples] == 0).all()
    assert (p.dividends[:, [3, 5, 6, 9, 10, 12]] != 0).all()
    assert not p.baseline.any()


@pytest.mark.parametrize("hidden", [(7,), (10, 8)])
def test_homogeneous(hidden: tuple[int, ...]) -> None:
    p = planted.homogeneous(hidden=hidden)
    total = p.model(p.x)[:, 0]
    assert near(p.truth.sum(1), total)
    assert near(p.model(0.3 * p.x), 0.3 * p.model(p.x))
    zero = from_baseline(p)
    methods = (ap.GradientTimesInput(), ap.IntegratedGradients(zero, EXACT), ap.DeepLIFT(zero))
    for method in methods:
        assert near(explained(method, p), p.truth), method
    assert near(explained(ap.LRP(rules=ap.rules.epsilon(1e-12)), p), p.truth, 1e-6)
    with pytest.raises(ConfigError, match="one width"):
        planted.homogeneous(hidden=())


def test_saturated() -> None:
    p = planted.saturated()
    assert (explained(ap.Gradient(), p) == 0).all()
    # the kink lies in the middle of the way
    assert near(explained(ap.IntegratedGradients(from_baseline(p), ap.quadrature.Midpoint(10)), p), p.truth)
    for method in (ap.DeepLIFT(from_baseline(p)), ap.Shapley(), ap.Occlusion()):
        assert near(explained(method, p), p.truth)


def test_too_many_features_are_refused() -> None:
    with pytest.raises(InputError, match="at most 12"):
        planted.dividends(lambda z: z.sum(1), torch.zeros(1, 13), torch.zeros(1, 13))
