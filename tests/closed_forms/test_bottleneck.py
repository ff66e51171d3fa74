"""The information bottleneck: the numbers of its code, a twin that reads like the paper, and its layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, SiteError
from apportion.methods.subset.information_bottleneck import information
from apportion.parts.subsets import LayerStatistics

F64 = torch.float64


def noise(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=F64)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 3),
    ).double()


def test_known_information():
    """KL(.3, 1.7) = .231725 nats = .33431 bits; λ = sigmoid(5) = .99331 at r' = 0: 4.5067 (methods.md 3G)."""
    gate, r = torch.tensor([0.3], dtype=F64), torch.tensor([1.7], dtype=F64)
    nats = information(gate, r)
    assert float(nats) == pytest.approx(0.231725, abs=5e-7)
    assert float(nats) / math.log(2) == pytest.approx(0.33431, abs=5e-6)
    plain = torch.distributions.kl_divergence(
        torch.distributions.Normal(gate * r, 1 - gate), torch.distributions.Normal(0.0, 1.0)
    )
    assert float(nats) == pytest.approx(float(plain))
    start = torch.tensor([5.0], dtype=F64).sigmoid()
    assert float(start) == pytest.approx(0.99331, abs=5e-6)
    assert float(information(start, torch.zeros(1, dtype=F64))) == pytest.approx(4.5067, abs=5e-5)


def test_nothing_infinite_where_all_comes_through():
    gate = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    nats = information(gate, torch.zeros(2, dtype=F64))
    assert bool(nats.isfinite().all())
    assert float(nats.detach()[0]) == pytest.approx(-0.5 - math.log(1e-6) + 0.5e-12, rel=1e-6)
    assert float(nats.detach()[1]) == 0
    (slope,) = torch.autograd.grad(nats.sum(), gate)
    assert bool(slope.isfinite().all())


def test_statistics_are_those_of_all_data_at_once(tmp_path: Path):
    torch.manual_seed(0)
    model, x = net(), noise(37)
    field = ap.Field(model, batch_size=5)
    values = model[:4](x).detach()
    labelled = [(x[:7], torch.zeros(7, dtype=torch.long)), (x[7:8], torch.zeros(1, dtype=torch.long))]
    for data in (x, [x[:1], x[1:20], x[20:]], [*labelled, (x[8:], torch.zeros(29, dtype=torch.long))]):
        s = LayerStatistics.fit(field, data, ap.At("3"))
        torch.testing.assert_close(s.mean, values.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s.std, values.std(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s.active, (values != 0).double().mean(0))
        assert s.examples == 37
    s.save(tmp_path / "s.safetensors")
    again = LayerStatistics.load(tmp_path / "s.safetensors")
    assert (again.layer, again.examples) == (s.layer, 37)
    assert all(torch.equal(getattr(again, n), getattr(s, n)) for n in ("mean", "std", "active"))
    with pytest.raises(ap.ApportionError, match="two"):
        LayerStatistics.fit(field, x[:1], ap.At("3"))


def smoothed(gate: Tensor) -> Tensor:
    """A Gaussian of 5 taps on each channel by itself, borders mirrored with the edge repeated."""
    taps = torch.tensor([math.exp(-(d**2) / 2) for d in (-2, -1, 0, 1, 2)], dtype=F64)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    wide = torch.cat([gate[:, [1, 0]], gate, gate[:, [-1, -2]]], 1)
    wide = torch.cat([wide[:, :, [1, 0]], wide, wide[:, :, [-1, -2]]], 2)
    return F.conv2d(wide[:, None], kernel[None, None])[:, 0]


def bottleneck(model: nn.Sequential, x: Tensor, target: int, data: Tensor, eps: Tensor, *, mean: bool = True) -> Tensor:
    """One picture, as the paper has it, by plain autograd and Adam by hand; bits, [h, w]. eps: [steps, copies, ...]."""
    layer, head = model[:4], model[4:]
    r, seen = layer(x)[0].detach(), layer(data).detach()
    mu, std = seen.mean(0), seen.std(0).clamp(min=0.01)
    active = (seen != 0).double().mean(0) > 0.01

    def nats(alpha: Tensor) -> Tensor:
        lam = smoothed(alpha.sigmoid())
        m, var = lam * (r - mu) / std, (1 - lam) ** 2
        return -0.5 * (1 + var.log() - m**2 - var) * active

    alpha = torch.full_like(r, 5.0).requires_grad_()
    first = second = torch.zeros_like(r)
    for t in range(len(eps)):
        lam = smoothed(alpha.sigmoid())
        entropy = 0.0
        for e in eps[t]:
            z = lam * r + (1 - lam) * (mu + std * e)
            entropy = entropy - head(z[None]).log_softmax(1)[0, target] / len(eps[t])
        kl = nats(alpha)
        (slope,) = torch.autograd.grad(entropy + 10 * (kl.mean() if mean else kl.sum()), alpha)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        step = (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        alpha = (alpha - step).detach().requires_grad_()
    return nats(alpha).detach().sum(0) / math.log(2)


def test_is_its_twin():
    torch.manual_seed(1)
    model, data, x = net(), noise(30), noise(2, 6)
    field = ap.Field(model)
    known = LayerStatistics.fit(field, data, ap.At("3"))
    a = ap.InformationBottleneck(known, steps=6, copies=3)(field, x, target=[0, 2], seed=8)
    stream = field.bind(x, target=[0, 2], seed=8).stream("bottleneck")
    like = torch.zeros(1, 4, 8, 8, dtype=F64)
    for b, target in enumerate((0, 2)):
        eps = stream.normal(like, torch.full((18,), b), torch.arange(18)).unflatten(0, (6, 3))
        twin = bottleneck(model, x[b : b + 1], target, data, eps)
        torch.testing.assert_close(a.values[b], twin, rtol=1e-8, atol=1e-10)
        wrong = bottleneck(model, x[b : b + 1], target, data, eps, mean=False)  # the paper's β with the code's number
        assert float((a.values[b] - wrong).abs().max()) > 1e-3
    torch.testing.assert_close(a.parts["bits"], a.values.sum((1, 2)))
    large = ap.InformationBottleneck(known, steps=6, copies=3, upsample=True)(field, x, target=[0, 2], seed=8)
    torch.testing.assert_close(large.values, a.values)  # a grid as large as the picture


class Corner(nn.Module):
    """Two classes: what stands in one corner of the picture, against nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        corner = self.layer(x)[:, :, :3, :3].mean((1, 2, 3))
        return torch.stack([8 * corner, 0 * corner], 1)


def test_bits_are_where_the_model_reads():
    model, data = Corner(), noise(200)
    field = ap.Field(model)
    known = LayerStatistics.fit(field, data, ap.At("layer"))
    x = noise(1, 7).abs() * 0.2 + 1.5
    a = ap.InformationBottleneck(known, steps=30, beta=1.0)(field, x, target=0)
    inside = a.values[0, :3, :3]
    outside = (a.values.sum() - inside.sum()) / (64 - 9)
    assert float(inside.mean()) > 3 * float(outside)


def test_more_weight_on_information_lets_fewer_bits_through():
    model, x = planted.conv_net(), noise(4)
    field = ap.Field(model)
    known = LayerStatistics.fit(field, noise(30))
    bits = [
        float(ap.InformationBottleneck(known, beta=beta)(field, x, target=1).parts["bits"].mean())
        for beta in (0.1, 10.0, 1000.0)
    ]
    assert bits[0] > bits[1] > bits[2] >= 0


class Around(nn.Module):
    """A layer with a way around it, and one behind where both have met."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(2, 2, 3, padding=1)
        self.met = nn.ReLU()
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.met(x + self.branch(x)).mean((2, 3)))


def test_the_layer_is_one_that_everything_passes():
    model, x = Around().double(), noise(20)
    field = ap.Field(model)
    q = field.bind(x)
    assert q.is_passed_by_all(ap.At("met"))
    assert not q.is_passed_by_all(ap.At("branch"))
    assert LayerStatistics.fit(field, x).layer in (ap.At("met", 0), ap.At("met"))
    branch = LayerStatistics.fit(field, x, model.get_submodule("branch"))
    leaky = ap.InformationBottleneck(branch, steps=1)(field, x[:2])
    assert any("ways around" in w for w in leaky.warnings)
    tight = ap.InformationBottleneck(LayerStatistics.fit(field, x), steps=1)(field, x[:2])
    assert not tight.warnings


def test_a_layer_that_may_lie_either_way_is_passed_over():
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # [1, 9, 9, 9], as the padding of EfficientNet-Lite is [1, 96, 113, 113]
    layers = [nn.Conv2d(2, 9, 3, padding=1), nn.ReLU(), pad, nn.Conv2d(9, 2, 3), nn.Flatten(), nn.Linear(98, 3)]
    field = ap.Field(nn.Sequential(*layers).double())
    assert LayerStatistics.fit(field, noise(4)).layer in (ap.At("3", 0), ap.At("3"))


def test_noisy_copies_are_asked_with_their_own_input_below():
    """Past a layer with a way around it, a copy's own input counts and not the example's."""
    model, x = Around().double(), noise(3)
    q = ap.Field(model).bind(x, target=1)
    copies = q.at(x.flip(3), torch.arange(3), torch.zeros(3, dtype=torch.long))
    inner = copies.inside(ap.At("branch"))
    value = inner.value(torch.zeros_like(inner.x), torch.arange(3))
    torch.testing.assert_close(value, model.head(x.flip(3).relu().mean((2, 3)))[:, 1].detach())
    with pytest.raises(SiteError, match="inside"):
        inner.inside(ap.At("met"))


def test_what_it_refuses():
    model, x = planted.conv_net(), noise(4)
    field = ap.Field(model)
    with pytest.raises(ConfigError, match="LayerStatistics"):
        ap.InformationBottleneck()(field, x)
    with pytest.raises(SiteError, match="K, h, w"):
        LayerStatistics.fit(field, x, ap.At("head"))
    known = LayerStatistics.fit(field, x)
    with pytest.raises(SiteError, match="fit them anew"):
        ap.InformationBottleneck(known)(field, torch.randn(1, 2, 12, 12, dtype=F64))


def test_units_that_never_fired_in_the_data_are_told_of() -> None:
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    field = ap.Field(net)
    known = ap.subsets.LayerStatistics.fit(field, -torch.rand(8, 1, 2, 2), ap.At("0"))
    a = ap.InformationBottleneck(known, steps=2, copies=2, sigma=0.0)(field, torch.ones(1, 1, 2, 2))
    assert float(a.values.abs().max()) == 0
    assert any("no upper bound" in w for w in a.warnings)


def test_a_layer_by_its_name_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ap\.At\('0'\)"):
        ap.subsets.LayerStatistics.fit(ap.Field(torch.nn.Sequential(torch.nn.ReLU())), torch.ones(2, 1, 2, 2), "0")
