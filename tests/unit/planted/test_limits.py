"""What no attribution can do: each limit holds, and methods of the registry run into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError
from apportion.planted.problem import shapley_shares


def test_complete_and_linear_attributions_predict_local_behavior_by_chance() -> None:
    p = planted.same_attribution(features=6)
    assert p.truth is not None
    # the breakpoints are multiples of 1/8, so the midpoints of eighths integrate exactly
    methods = (ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(8)), ap.Shapley(), ap.KernelSHAP())
    up = p.x + 0.1 * torch.eye(6, dtype=torch.float64)
    for method in methods:
        right = []
        for model in (p.model, p.other):
            values = method(ap.Field(model), p.x).values
            assert torch.allclose(values, p.truth, atol=1e-9)
            assert torch.isclose(values.sum(), (model(p.x) - model(p.baseline)).sum())
            rises = model(up) > model(p.x)
            right.append((values[0] > 0) == rises)
        assert torch.cat(right).double().mean() == 0.5
    for model, sign in ((p.model, 1), (p.other, -1)):
        slope = ap.Gradient()(ap.Field(model), p.x).values
        assert torch.equal(slope, sign * p.slopes)
        assert torch.equal((slope > 0)[0], model(up) > model(p.x))


def test_they_are_linear_as_far_as_is_said() -> None:
    p = planted.same_attribution(seed=3)
    assert p.truth is not None
    generator = torch.Generator().manual_seed(0)
    move = (2 * torch.rand(50, 6, generator=generator, dtype=torch.float64) - 1) * p.radius
    for model, sign in ((p.model, 1), (p.other, -1)):
        assert torch.allclose(model(p.x + move) - model(p.x), (move * sign * p.slopes).sum(1))
    assert torch.allclose(shapley_shares(planted.dividends(p.other, p.x, p.baseline)), p.truth)


def test_no_attribution_meets_sensitivity_1_and_2() -> None:
    p = planted.product()
    for mask, drop in zip(p.masks, p.drops.T, strict=True):
        assert torch.allclose(p.model(p.x) - p.model(torch.where(mask, p.baseline, p.x)), drop)
    sums = p.masks.double()
    best = torch.linalg.lstsq(sums, p.drops.T).solution.T
    assert torch.allclose(p.truth, best)
    assert torch.allclose((p.truth @ sums.T - p.drops).norm(dim=1), p.residual)
    generator = torch.Generator().manual_seed(0)
    others = p.truth + torch.randn(200, 4, 2, generator=generator, dtype=torch.float64)
    assert ((others @ sums.T - p.drops).norm(dim=2) >= p.residual).all()

    def missed(method: ap.Explainer) -> Tensor:
        return (method(ap.Field(p.model), p.x).values @ sums.T - p.drops).abs() > 1e-9

    assert missed(ap.Occlusion()).any(0).tolist() == [False, False, True]
    for method in (ap.Shapley(), ap.IntegratedGradients()):
        assert missed(method).any(0).tolist() == [True, True, False]


@pytest.mark.parametrize("seed", [0, 1])
def test_guided_maps_point_at_an_object_that_is_not_used(seed: int) -> None:
    p = planted.background_only(seed=seed)
    field = ap.Field(p.model)
    assert torch.equal(p.model(p.x).argmax(1), p.labels)
    noise = torch.rand(p.x.shape, generator=torch.Generator().manual_seed(0)) * 3 - 1
    for inside in (p.without, noise, torch.zeros_like(p.x)):
        assert torch.equal(p.model(torch.where(p.truth, p.x, inside)), p.model(p.x))
    assert not torch.allclose(p.model(torch.where(p.truth, noise, p.x)), p.model(p.x))
    assert not (p.objects & p.truth).any()

    for method in (ap.GuidedBackprop(), ap.Deconvnet()):
        values = method(field, p.x, target=p.target).values
        for heat in (values.abs().sum(1), values.sum(1), values.abs().amax(1)):
            at = heat.flatten(1).argmax(1)
            assert p.objects.flatten(1).gather(1, at[:, None]).all()

    slope = ap.Gradient()(field, p.x, target=p.target).values.abs().amax(1)
    assert (slope[~p.truth.expand_as(slope)] == 0).all()
    assert (slope[p.truth.expand_as(slope)] > 0).all()
    # the frame's sum is rounded otherwise in another batch
    removed = ap.Occlusion(ap.groups.Patches(2, 2))(field, p.x, target=p.target).spread().values
    assert (removed[(~p.truth).expand_as(removed)].abs() < 1e-6).all()
    assert removed.abs().amax() > 0.01


def test_small_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 12"):
        planted.background_only(side=11)


def test_seeds_alone_decide() -> None:
    before = torch.random.get_rng_state()
    a, b, c = planted.background_only(), planted.background_only(), planted.background_only(seed=4)
    one, two = planted.same_attribution(seed=1), planted.same_attribution(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, c.x)
    assert torch.equal(one.slopes, two.slopes)
