"""Closed forms of attributions on small functions, for the methods present.

Points, values and baselines are those every method is held to; B2 has the closed form
IG1 = x2 (x1² - 1) / (2 x1), IG2 = x2 (x1 - 1)² / (2 x1).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.explainer import Explainer

GTI = ap.GradientTimesInput()


def ig(n: int = 64) -> Explainer:
    return ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(n))


class MaxPrimitive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x[:, 0], x[:, 1])


LINEAR = planted.Linear([1.0, -2.0], 0.7)
ROWS = [
    # name, model, x, f(x)-f(0), gradient*input, IG, IG tolerance
    ("B1", planted.RootSum(), (4.0, 4.0), 6.0, (4.0, 1.0), (4.0, 2.0), 0.05),
    ("B2", planted.ReluProduct(), (2.0, 3.0), 3.0, (6.0, 3.0), (2.25, 0.75), 1e-4),
    ("B3", planted.Max(), (3.0, 1.0), 3.0, (3.0, 0.0), (3.0, 0.0), 1e-12),
    ("B3 primitive", MaxPrimitive(), (3.0, 1.0), 3.0, (3.0, 0.0), (3.0, 0.0), 1e-12),
    ("B3'", planted.Max(), (2.0, 2.001), 2.001, (0.0, 2.001), (0.0, 2.001), 1e-12),
    ("B4", planted.Saturated(), (2.0, 0.0), 1.0, (0.0, 0.0), (1.0, 0.0), 1e-12),
    ("B5", planted.Product(), (2.0, 3.0), 6.0, (6.0, 6.0), (3.0, 3.0), 1e-12),
    ("B6", LINEAR, (3.0, 5.0), -7.0, (3.0, -10.0), (3.0, -10.0), 1e-12),
    ("B7", planted.Min(), (2.0, 1.0), 1.0, (0.0, 1.0), (0.0, 1.0), 1e-12),
]


@pytest.mark.parametrize(
    ("model", "x", "total", "product", "path", "tolerance"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_row(
    model: nn.Module,
    x: tuple[float, float],
    total: float,
    product: tuple[float, float],
    path: tuple[float, float],
    tolerance: float,
) -> None:
    field = ap.Field(model)
    point = torch.tensor([x], dtype=torch.float64)
    a = GTI(field, point)
    assert a.values[0].tolist() == pytest.approx(product, abs=1e-12)
    assert a.claimed_total is not None
    assert a.claimed_total.tolist() == pytest.approx([total], abs=1e-12)
    b = ig(200 if tolerance > 1e-3 else 64 if tolerance < 1e-6 else 4000)(field, point)
    assert b.values[0].tolist() == pytest.approx(path, abs=tolerance)
    assert b.claimed_total is not None
    assert b.claimed_total.tolist() == pytest.approx([total], abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (ap.quadrature.Right(50), 1.8035),
        (ap.quadrature.Midpoint(50), 1.9145),
        (ap.quadrature.Gauss(50), 1.9828),
        (ap.quadrature.Midpoint(1000), 1.9809),
        (ap.quadrature.Gauss(1000), 1.9991),
    ],
)
def test_b1_converges_slowly_as_known(rule: ap.quadrature.Quadrature, value: float) -> None:
    a = ap.IntegratedGradients(quadrature=rule)(
        ap.Field(planted.RootSum()), torch.tensor([[4.0, 4.0]], dtype=torch.float64)
    )
    assert a.values[0, 1].item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("rule", [ap.quadrature.Left(8), ap.quadrature.Trapezoid(8)])
def test_rules_with_the_baseline_refuse_an_infinite_gradient(rule: ap.quadrature.Quadrature) -> None:
    field = ap.Field(planted.RootSum())
    with pytest.raises(ap.ApportionError, match=r"gradient .* is NaN or infinite for example 0"):
        ap.IntegratedGradients(quadrature=rule)(field, torch.tensor([[4.0, 4.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "values"),
    [  # f = x³ at 1, exact 1; 10, 25, 50 nodes
        (ap.quadrature.Left, (0.855, 0.9408, 0.9702)),
        (ap.quadrature.Right, (1.155, 1.0608, 1.0302)),
        (ap.quadrature.Midpoint, (0.9975, 0.9996, 0.9999)),
        (ap.quadrature.Gauss, (1.0, 1.0, 1.0)),
    ],
)
def test_cubic(rule: type[ap.quadrature.Quadrature], values: tuple[float, ...]) -> None:
    field = ap.Field(lambda x: x[:, 0] ** 3)
    for n, value in zip((10, 25, 50), values, strict=True):
        a = ap.IntegratedGradients(quadrature=rule(n))(field, torch.ones(1, 1, dtype=torch.float64))
        assert a.values.item() == pytest.approx(value, abs=1e-12 if rule is ap.quadrature.Gauss else 5e-5)


def test_cubic_trapezoid_on_one_more_node() -> None:
    field = ap.Field(lambda x: x[:, 0] ** 3)
    for m, value in ((10, 1.005), (25, 1.0008), (50, 1.0002)):
        a = ap.IntegratedGradients(quadrature=ap.quadrature.Trapezoid(m + 1))(field, torch.ones(1, 1).double())
        assert a.values.item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("n", [2, 3, 16])
def test_cubic_is_exact_with_gauss_nodes(n: int) -> None:
    field = ap.Field(lambda x: (x**3).sum(1) + x[:, 0] ** 2 * x[:, 1])
    x = torch.tensor([[1.5, -0.5], [0.3, 2.0]], dtype=torch.float64)
    a = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(n))(field, x)
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-12
    exact = torch.stack(
        [x[:, 0] ** 3 + 2 / 3 * x[:, 0] ** 2 * x[:, 1], x[:, 1] ** 3 + 1 / 3 * x[:, 0] ** 2 * x[:, 1]], 1
    )
    assert torch.allclose(a.values, exact, rtol=0, atol=1e-12)


def test_two_nodes_are_too_few_for_degree_four() -> None:
    """The tolerance above can fail: Gauss(2) is exact to degree 3 of the derivative only."""
    field = ap.Field(lambda x: (x**6).sum(1))
    a = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(2))(field, torch.ones(1, 1).double())
    assert a.gap is not None
    assert float(a.gap.abs()) > 1e-3


def _mlp(bias: bool) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 16, bias), nn.ReLU(), nn.Linear(16, 12, bias), nn.ReLU(), nn.Linear(12, 3, bias))
    return net.double().eval()


def test_b8_without_bias_integrated_gradients_is_gradient_times_input() -> None:
    field, x = ap.Field(_mlp(bias=False)), torch.randn(4, 6).double()
    a, b = ap.IntegratedGradients()(field, x, target=1), GTI(field, x, target=1)
    assert torch.allclose(a.values, b.values, rtol=0, atol=1e-14)
    assert b.gap is not None
    assert float(b.gap.abs().max()) < 1e-14


def test_b9_with_bias_they_differ() -> None:
    field, x = ap.Field(_mlp(bias=True)), torch.randn(4, 6).double()
    a, b = ap.IntegratedGradients()(field, x, target=1), GTI(field, x, target=1)
    assert float((a.values - b.values).abs().max()) > 1e-3
    assert b.gap is not None
    assert float(b.gap.abs().max()) > 1e-3


def test_b9_lrp_with_bias_in_z_is_gradient_times_input() -> None:
    q = ap.Field(_mlp(bias=True)).bind(torch.randn(4, 6).double(), target=1)
    done = q.backward(q.x, torch.arange(4), ap.rules.epsilon(0.0))
    assert torch.allclose(done.relevance, GTI(q.field, q.x, target=1).values, rtol=0, atol=1e-14)


def test_smooth_statistics_of_a_square() -> None:
    """SmoothGrad = 2x, SmoothGrad² = 4x² + 4σ², VarGrad = 4σ² for x², within sampling error."""
    field, x = ap.Field(lambda z: (z**2).sum(1)), torch.full((1, 400), 1.5, dtype=torch.float64)
    noise = ap.noise.Gaussian(0.4, relative=False)
    n = 500
    mean = ap.SmoothGrad(samples=n, noise=noise)(field, x)
    square = ap.SmoothGradSquared(samples=n, noise=noise)(field, x)
    variance = ap.VarGrad(samples=n, noise=noise)(field, x)
    assert mean.values.mean().item() == pytest.approx(3.0, abs=0.01)
    assert square.values.mean().item() == pytest.approx(9.64, abs=0.05)
    assert variance.values.mean().item() == pytest.approx(0.64, abs=0.01)
    # the same draws: second moment = variance + mean², exactly
    assert torch.allclose(square.values, variance.values + mean.values**2, rtol=1e-12)
    error = mean.parts["standard_error"].mean().item()
    assert error == pytest.approx(0.8 / n**0.5, rel=0.05)


def test_statistics_of_a_linear_model_are_exact() -> None:
    field, x = ap.Field(planted.Linear([1.0, -2.0])), torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    assert ap.SmoothGrad()(field, x).values.tolist() == [[1.0, -2.0]]
    assert ap.VarGrad()(field, x).values.tolist() == [[0.0, 0.0]]
    assert ap.SmoothGradSquared()(field, x).values.tolist() == [[1.0, 4.0]]


def test_smooth_grad_at_a_kink_is_one_half() -> None:
    field = ap.Field(lambda z: z.relu().sum(1))
    a = ap.SmoothGrad(samples=400, noise=ap.noise.Gaussian(1.0, relative=False))(field, torch.zeros(1, 50).double())
    assert a.values.mean().item() == pytest.approx(0.5, abs=0.02)


def test_grad_cam_of_a_linear_head_sums_to_the_logit() -> None:
    """With global average pooling and a linear head α_k = w_k / (h w), so the map sums to logit minus bias."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.randn(3, 2, 7, 7).double()
    a = ap.GradCAM(layer=ap.At("1"), relu=False)(ap.Field(net), x, target=2)
    with torch.no_grad():
        logit = net(x)[:, 2] - net.get_parameter("4.bias")[2]
    assert torch.allclose(a.values.flatten(1).sum(1), logit, rtol=0, atol=1e-14)
    clipped = ap.GradCAM(layer=ap.At("1"))(ap.Field(net), x, target=2)
    assert torch.equal(clipped.values, a.values.relu())
    assert torch.equal(ap.GradCAM()(ap.Field(net), x, target=2).values, clipped.values)  # "auto" finds the same layer


def test_grad_cam_reads_what_flows_on_not_what_an_in_place_relu_left() -> None:
    def make(inplace: bool) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
        ).double()

    x = torch.randn(2, 1, 6, 6).double()
    a, b = (ap.GradCAM(ap.At("0"), relu=False)(ap.Field(make(i)), x, target=0) for i in (True, False))
    assert torch.equal(a.values, b.values)


def test_baseline_equal_to_the_input_gives_zero() -> None:
    field, x = ap.Field(planted.dense_net()), torch.randn(2, 5).double()
    a = ap.IntegratedGradients(baseline=ap.baselines.Given(x))(field, x, target=0)
    assert float(a.values.abs().max()) == 0.0
    assert a.references is not None
    assert a.references.equal_share.tolist() == [[1.0], [1.0]]


def test_grad_cam_with_a_head_that_looks_at_places() -> None:
    """A flattening head's gradient differs from place to place, so that its mean is no other statistic."""
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh()).double()
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 5 * 5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(3, 2, 7, 7).double()
    act = stem(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(head(act)[:, 2].sum(), act)
    assert float((grad.amax((2, 3)) - grad.mean((2, 3))).abs().min()) > 1e-3
    want = torch.stack(
        [sum((g.sum() / 25 * a for g, a in zip(grad[b], act[b], strict=True)), torch.zeros(5, 5)) for b in range(3)]
    )
    want = want.detach()
    field = ap.Field(nn.Sequential(stem, head))
    signed = ap.GradCAM(ap.At("0"), relu=False)(field, x, target=2)
    assert torch.allclose(signed.values, want, rtol=0, atol=1e-15)
    assert torch.equal(ap.GradCAM(ap.At("0"))(field, x, target=2).values, signed.values.relu())


@dataclass(frozen=True)
class Noted(ap.Explainer):
    """The gradient, which keeps every map it gives."""

    card = ap.Gradient.card

    def explain(self, q: ap.Question) -> ap.Attribution:
        a = ap.Gradient().explain(q)
        MAPS.append(a.values)
        return a

    def passes(self, q: ap.Question | None = None) -> ap.Passes:
        return ap.Passes(1, 1)


MAPS: list[Tensor] = []


@pytest.mark.parametrize("n", [2, 3, 5])
def test_standard_error_of_few_maps(n: int) -> None:
    MAPS.clear()
    x = torch.randn(4, 5).double()
    a = ap.SmoothGrad(Noted(), samples=n)(ap.Field(planted.dense_net()), x, target=1)
    maps = torch.cat(MAPS).reshape(n, 4, 5)  # all examples meet one draw before the next
    assert torch.allclose(a.values, maps.mean(0), rtol=0, atol=1e-15)
    error = torch.std(maps, 0, correction=1) / n**0.5
    assert torch.allclose(a.parts["standard_error"], error, rtol=1e-10, atol=1e-15)


def test_a_single_map_has_no_standard_error() -> None:
    a = ap.SmoothGrad(samples=1)(ap.Field(planted.dense_net()), torch.randn(2, 5).double(), target=1)
    assert "standard_error" not in a.parts


@pytest.mark.parametrize("kind", [ap.VarGrad, ap.SmoothGradSquared])
def test_squares_are_sensitivities_whatever_the_base(kind: type[Explainer]) -> None:
    a = kind(ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(4)), samples=3)(  # pyright: ignore[reportCallIssue]
        ap.Field(planted.dense_net()), torch.randn(2, 5).double(), target=1
    )
    assert a.kind is ap.Kind.SENSITIVITY
    assert a.claimed_total is None
    assert not kind.card.signed
