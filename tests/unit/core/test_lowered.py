"""Lowered precision: sums stay in float32, the distance from float32 is measured, told and warned of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError, NonFiniteError


def _net() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


X = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(1))
METHODS = [
    ap.Gradient(),
    ap.IntegratedGradients(),
    ap.SmoothGrad(samples=3),
    ap.GradCAM(layer=ap.At("3")),
    ap.LRP(rules=ap.rules.epsilon_plus()),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_method_stays_near_and_in_float32(method: Any, precision: str) -> None:
    net = _net()
    low = method(ap.Field(net, precision=precision), X, target=1)  # pyright: ignore[reportArgumentType]
    full = method(ap.Field(net), X, target=1)
    assert low.values.dtype == low.value.dtype == torch.float32
    assert not torch.equal(low.value, full.value)
    cosine = torch.cosine_similarity(low.values.flatten(1), full.values.flatten(1)).min()
    assert cosine > 0.95
    assert low.engine["precision"] == precision
    assert low.engine["deviation"]["examples"] == 4
    assert 0 < low.engine["deviation"]["relative_error"] < 0.2
    assert 0.95 < low.engine["deviation"]["cosine"] < 1 + 1e-9
    assert torch.equal(low.cost.forward, full.cost.forward)
    assert "precision" not in full.engine


def test_the_deviation_is_that_of_the_gradient() -> None:
    net = _net()
    low = ap.Gradient()(ap.Field(net, precision="bf16"), X[:3], target=1)
    full = ap.Gradient()(ap.Field(net, fast=False), X[:3], target=1)
    error = (low.values - full.values).flatten(1).norm(dim=1) / full.values.flatten(1).norm(dim=1)
    assert low.engine["deviation"]["relative_error"] == pytest.approx(float(error.max()), rel=0.02)


class Fragile(nn.Module):
    """A difference of large numbers that are nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1, bias=False)
        self.a.weight.data.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(100 * x).square() - self.a(100 * x + 0.1).square()


def test_a_large_deviation_is_warned_of() -> None:
    x = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    a = ap.Gradient()(ap.Field(Fragile(), precision="bf16"), x)
    assert any("precision='bf16' takes the gradient" in w for w in a.warnings)
    assert not ap.Gradient()(ap.Field(nn.Linear(4, 1), precision="bf16"), x).warnings


def test_sums_over_a_path_are_in_float32() -> None:
    """A linear score has the same gradient everywhere: IG then sums exactly to the difference of scores."""
    torch.manual_seed(0)
    net = nn.Linear(50, 1, bias=False)
    net.weight.data = net.weight.data.bfloat16().float()
    x = torch.rand(2, 50)
    a = ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(200))(ap.Field(net, precision="bf16"), x)
    assert torch.allclose(a.values, x * net.weight, rtol=1e-5, atol=1e-6)


class Faint(nn.Module):
    """Its gradient, 1e-8, is smaller than any number of fp16, and so is the signal of rules on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.first.weight.data.fill_(1e-3)
        self.last.weight.data.fill_(1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


FAINT = [ap.Gradient(), ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(3)), ap.GuidedBackprop(), ap.LRP()]


@pytest.mark.parametrize("method", FAINT, ids=lambda m: type(m).__name__)
def test_small_gradients_do_not_vanish_in_fp16(method: Any) -> None:
    x = 1000 * torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    low = method(ap.Field(Faint(), precision="fp16"), x)
    full = method(ap.Field(Faint()), x)
    assert torch.allclose(low.values, full.values, rtol=0.02)
    assert low.engine["deviation"]["loss_scale"] == 4096
    assert not low.warnings


def test_a_site_and_the_second_derivative_are_scaled_back() -> None:
    x = 1000 * torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    low, full = (ap.Field(Faint(), precision=p).bind(x) for p in ("fp16", None))
    every = torch.arange(2)
    taps = [q.tap(x, every, [ap.At("first")])[1][ap.At("first")].grad for q in (low, full)]
    assert taps[0] is not None
    assert taps[1] is not None
    assert torch.allclose(taps[0], taps[1], rtol=0.02)
    square = [
        ap.Field(lambda z: (z * z).sum(1, keepdim=True), precision=p).bind(x / 1000).hvp(x / 1000, every, x)
        for p in ("fp16", None)
    ]
    for a, b in zip(*square, strict=True):
        assert torch.allclose(a, b, rtol=0.01)


def test_the_scale_backs_off_and_overflow_is_told() -> None:
    x = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(3, 1)
    net.weight.data.fill_(100.0)
    a = ap.Gradient()(ap.Field(net, precision="fp16"), x)
    assert a.engine["deviation"]["loss_scale"] == 64
    assert torch.allclose(a.values, net.weight.expand(2, 3))
    net.weight.data.fill_(5e4)
    with pytest.raises(NonFiniteError, match="65,504 in fp16"):
        ap.Gradient()(ap.Field(net, precision="fp16"), x)


def test_signals_under_rules_are_compared_with_float32() -> None:
    net = _net()
    a, b = (ap.GuidedBackprop()(ap.Field(net, precision=p), X, target=1) for p in ("bf16", None))
    (told,) = a.engine["deviation_under_rules"]
    assert told["of"] == "gradient under rules"
    error = (a.values - b.values).flatten(1).norm(dim=1) / b.values.flatten(1).norm(dim=1)
    assert told["examples"] == 4
    assert told["relative_error"] == pytest.approx(float(error[:4].max()), rel=0.05)
    assert "deviation_under_rules" not in b.engine
    assert torch.equal(a.cost.forward, b.cost.forward)
    kink = nn.Sequential(nn.Linear(1, 1), nn.ReLU())  # 1.003 - 1 is above it, and 0 in bfloat16
    for p, value in zip(kink.parameters(), (1.003, -1.0), strict=True):
        p.data.fill_(value)
    far = ap.GuidedBackprop()(ap.Field(kink, precision="bf16"), torch.ones(1, 1))
    assert any("gradient under rules" in w for w in far.warnings)


@pytest.mark.parametrize("precision", ["half", "bfloat16", "float32", "", torch.int32])
def test_what_is_no_precision(precision: Any) -> None:
    with pytest.raises(ConfigError, match="'bf16', 'fp16', 'tf32'"):
        ap.Field(_net(), precision=precision)


def test_where_it_cannot_be() -> None:
    with pytest.raises(InputError, match="NVIDIA"):
        ap.Field(_net(), precision="tf32").bind(X, target=0)
    with pytest.raises(InputError, match="float32"):
        ap.Field(_net().double(), precision="bf16").bind(X.double(), target=0)


def test_the_record_survives(tmp_path: Any) -> None:
    a = ap.Gradient()(ap.Field(_net(), precision="bf16"), X, target=1)
    a.save(tmp_path / "a.safetensors")
    assert ap.Attribution.load(tmp_path / "a.safetensors").engine == a.engine
    assert (
        ap.Gradient()(ap.Field(_net().double(), precision=torch.float64), X, target=1).engine["precision"] == "float64"
    )


class _Counts(nn.Module):
    """Counts the rows that run through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        ROWS.append(len(x))
        return self.head(self.act(self.conv(x)).mean((2, 3)))


ROWS: list[int] = []


@pytest.mark.parametrize("method", [ap.Gradient(), ap.GuidedBackprop(), ap.DeepLIFT(), ap.GuidedGradCAM()])
def test_measuring_a_lowered_precision_is_billed_as_it_ran(method: Any) -> None:
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ROWS.clear()
    cost = method(ap.Field(_Counts().eval(), precision="bf16"), x, target=0).cost
    assert sum(ROWS) == cost.checks + cost.forward.sum() + cost.at_x.sum()


@pytest.mark.parametrize("past_versions", [True, False])
def test_a_deviation_is_measured_anew_on_other_weights(past_versions: bool) -> None:
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = _Counts().eval()
    field = ap.Field(model, precision="bf16")
    found = [ap.Gradient()(field, x, target=0).engine["deviation"] for _ in range(2)]
    assert found[0] is found[1]
    with torch.no_grad():
        weight = model.conv.weight.data if past_versions else model.conv.weight
        weight.view(-1)[0] = 3.0
        model.head.bias.data.add_(0.5)
    after = ap.Gradient()(field, x, target=0).engine["deviation"]
    assert after != found[0]
    assert after == ap.Gradient()(ap.Field(model, precision="bf16"), x, target=0).engine["deviation"]
