"""Layer-wise relevance propagation against the textbook's sums, one layer written as an explicit matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.parts.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    GeneralizedGamma,
    Identity,
    Plain,
    Rule,
    Rules,
    WSquare,
    ZBox,
    ZPlus,
)

LOW, HIGH = -4.0, 5.0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the textbook: shares of one output, from inputs x, weights w, bias b and output z --------------


def plus(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def minus(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def zero(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    return x * w / z


def epsilon(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    return x * w / (z + 0.01 * (1 if z >= 0 else -1))


def alpha_beta(
    x: Tensor, w: Tensor, b: float, z: float, one: Tensor, alpha: float = 2, beta: float = 1, bias: bool = False
) -> Tensor:
    c = x * w
    p, n = plus(c).sum() + bias * max(b, 0), minus(c).sum() + bias * min(b, 0)
    return (alpha * plus(c) / p if p > 0 else 0 * c) - (beta * minus(c) / n if n < 0 else 0 * c)


def alpha_beta_with_bias(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    return alpha_beta(x, w, b, z, one, bias=True)


def redistributed(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    p, n = bool((x * w > 0).any()), bool((x * w < 0).any())
    return alpha_beta(x, w, b, z, one, 1 if p and not n else 2, -1 if n and not p else 1)


def z_plus(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    return alpha_beta(x, w, b, z, one, 1, 0)


def gamma(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    c = x * (w + 0.25 * plus(w))
    return c / (c.sum() + b + 0.25 * max(b, 0))


def generalized_gamma(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    c = x * w
    c, b = (c + 0.25 * plus(c), b + 0.25 * max(b, 0)) if z > 0 else (c + 0.25 * minus(c), b + 0.25 * min(b, 0))
    return c / (c.sum() + b)


def w_square(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    return w**2 / (w**2).sum()


def flat(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    return one / one.sum()


def z_box(x: Tensor, w: Tensor, b: float, z: float, one: Tensor) -> Tensor:
    c = x * w - LOW * plus(w) - HIGH * minus(w)
    return c / c.sum()


Shares = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]
TEXTBOOK: dict[str, tuple[Rule, Shares]] = {
    "0": (Epsilon(0.0), zero),
    "epsilon": (Epsilon(0.01), epsilon),
    "alpha-beta": (AlphaBeta(), alpha_beta),
    "alpha-beta, bias": (AlphaBeta(bias=True), alpha_beta_with_bias),
    "alpha-beta, redistributed": (AlphaBeta(redistribute=True), redistributed),
    "z+": (ZPlus(), z_plus),
    "gamma": (Gamma(), gamma),
    "generalized gamma": (GeneralizedGamma(), generalized_gamma),
    "w2": (WSquare(), w_square),
    "flat": (Flat(), flat),
    "zB": (ZBox(LOW, HIGH), z_box),
}


def matrix(layer: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Write an affine layer as a matrix [in, out] and a bias [out], one unit vector at a time."""
    units = torch.eye(like.numel(), dtype=like.dtype).reshape(-1, *like.shape)
    bias = layer(torch.zeros(1, *like.shape, dtype=like.dtype)).flatten()
    return layer(units).flatten(1) - bias, bias


def textbook(shares: Shares, layer: Callable[[Tensor], Tensor], ones: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """R_i = Σ_j share_ij R_j for one example, with R_j = scale_j z_j."""
    w, b = matrix(layer, x)
    z = x.flatten() @ w + b
    out = torch.zeros(x.numel(), dtype=x.dtype)
    for j in range(len(z)):
        out += shares(x.flatten(), w[:, j], float(b[j]), float(z[j]), ones[:, j]) * scale[j] * z[j]
    return out.reshape(x.shape)


def relevance(model: Callable[[Tensor], Tensor], rules: Rules, x: Tensor, scale: Tensor) -> Tensor:
    """What the library makes of it when R_j = scale_j z_j arrives at the outputs."""
    q = ap.Field(model, score=lambda out, _: (out.flatten(1) * scale).sum(1)).bind(x, target=0)
    found = q.backward(x, torch.arange(len(x)), rules).relevance
    assert isinstance(found, Tensor)
    return found


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (5,)),
    "linear without bias": (nn.Linear(5, 4, bias=False), (5,)),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5)),
    "conv2d, dilated, strided": (nn.Conv2d(2, 2, 2, stride=2, dilation=2, bias=False), (2, 5, 6)),
    "conv2d, grouped": (nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "conv2d, depth-wise": (nn.Conv2d(3, 3, 2, groups=3), (3, 3, 3)),
    "conv3d": (nn.Conv3d(1, 2, 2, padding=(0, 1, 0)), (1, 3, 2, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 3)),
    "transposed 2d": (nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1), (2, 3, 3)),
    "transposed 2d, grouped": (nn.ConvTranspose2d(4, 2, 2, groups=2, bias=False), (4, 2, 2)),
    "transposed 3d": (nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
}


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Give a layer with random weights, two inputs, factors of the outputs, and who is connected to whom."""
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    for i, p in enumerate(layer.parameters()):
        p.copy_(randn(*p.shape, seed=i))
    x = randn(2, *shape, seed=5)
    scale = randn(layer(x)[0].numel(), seed=6)
    filled = copy.deepcopy(layer)
    for p in filled.parameters():
        p.fill_(1.0)
    return layer, x, scale, matrix(filled, x[0])[0]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", TEXTBOOK)
def test_every_rule_on_every_layer_is_the_textbooks(rule: str, name: str):
    ours, shares = TEXTBOOK[rule]
    layer, x, scale, ones = prepared(name)
    if rule == "gamma":
        x = x.abs()  # the simple form is for inputs that are not negative
    rules = Rules(first=ours) if ours.relevance else Rules((("layer", ours),))
    got = relevance(layer, rules, x, scale)
    want = torch.stack([textbook(shares, layer, ones, row, scale) for row in x])
    size = float(want.abs().max())
    torch.testing.assert_close(got, want, atol=1e-12 * size, rtol=0)
    other = textbook(zero if rule != "0" else z_plus, layer, ones, x[0], scale)
    assert (other - got[0]).abs().max() > 1e-4 * size  # another rule is told apart


def norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(2).double().eval().requires_grad_(False)
    for i, t in enumerate((layer.weight, layer.bias, layer.running_mean, layer.running_var)):
        assert t is not None
        t.copy_(randn(2, seed=i).abs() + 0.2)
    return layer


CONNECTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, tuple[int, ...]]] = {
    "average pooling 1d": (nn.AvgPool1d(2, padding=1), "avg_pool1d", (2, 5)),
    "average pooling 2d, overlapping": (nn.AvgPool2d(3, stride=1), "avg_pool2d", (2, 4, 4)),
    "average pooling 3d": (nn.AvgPool3d(2), "avg_pool3d", (1, 2, 4, 2)),
    "adaptive average pooling": (nn.AdaptiveAvgPool2d((1, 2)), "adaptive_avg_pool2d", (2, 3, 4)),
    "mean over space": (lambda x: x.mean((2, 3)), "mean", (2, 3, 4)),
    "batch-norm": (norm(), "batch_norm", (2, 3, 3)),
    "residual addition": (lambda x: x[:, :2] + x[:, 2:], "add", (4, 3)),
    "difference": (lambda x: x[:, :2] - 2 * x[:, 2:], "sub", (4, 3)),
    "concatenation": (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), "cat", (4, 3)),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_what_is_affine_shares_in_proportion(name: str):
    """LRP-0 without a rule, ε with one; a sum, a mean and a concatenation are layers with known weights."""
    layer, op, shape = CONNECTIONS[name]
    x = randn(2, *shape, seed=7)
    scale = randn(layer(x)[0].numel(), seed=8)
    ones = torch.ones(x[0].numel(), len(scale))
    for rules, shares in ((Rules(), zero), (Rules(((op, Epsilon(0.01)),)), epsilon)):
        want = torch.stack([textbook(shares, layer, ones, row, scale) for row in x])
        got = relevance(layer, rules, x, scale)
        torch.testing.assert_close(got, want, atol=1e-12 * float(want.abs().max()), rtol=0)


def test_max_pooling_sends_to_the_winner():
    x = torch.tensor([[[1.0, 3.0, 2.0, -5.0]]], dtype=torch.float64)
    got = relevance(nn.MaxPool1d(2), ap.rules.epsilon(), x, torch.tensor([2.0, 0.5], dtype=torch.float64))
    assert got.tolist() == [[[0.0, 6.0, 1.0, 0.0]]]


# -- values computed independently -----------------------------------------------------------------

W = torch.tensor([[1.0, -1, 0.5], [0.5, 2, 1]], dtype=torch.float64)
B = torch.tensor([0.1, -0.3], dtype=torch.float64)
X = torch.tensor([[1.0, 2, -1]], dtype=torch.float64)
R = torch.tensor([1.0, 2], dtype=torch.float64)
KNOWN: dict[str, tuple[Rule, bool, tuple[float, float, float]]] = {
    "LRP-0": (Epsilon(0.0), True, (-0.4018, 3.9286, -0.2679)),
    "alpha2beta1": (AlphaBeta(), False, (2.4444, 2.7556, -2.2)),
    "z+": (ZPlus(), False, (1.2222, 1.7778, 0.0)),
    "gamma": (Gamma(0.25), False, (-0.6234, 3.7403, -0.1169)),
    "generalized gamma": (GeneralizedGamma(0.25), False, (-0.2003, 3.3386, -0.1383)),
    "w2": (WSquare(), True, (0.5397, 1.9683, 0.4921)),
    "flat": (Flat(), True, (1.0, 1.0, 1.0)),
    "zB": (ZBox(-2.0, 3.0), True, (0.9524, 1.7460, 0.3016)),
}
SUMS = {
    "LRP-0": (Epsilon(0.0), True, 3.2589),
    "alpha2beta1 with its biases": (AlphaBeta(bias=True), True, 3.2797),
    "alpha2beta1, biases ignored": (AlphaBeta(), True, 3.0),
    "z+ with its biases": (AlphaBeta(1.0, 0.0, bias=True), True, 2.9091),
    "z+, biases ignored": (ZPlus(), True, 3.0),
}


def layer_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double().requires_grad_(False)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def arriving(rule: Rule, bias: bool) -> Tensor:
    layer = layer_of(W, B if bias else None)
    rules = Rules(first=rule) if rule.relevance else Rules((("layer", rule),))
    return relevance(layer, rules, X, R / layer(X)[0])


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str):
    rule, bias, want = KNOWN[name]
    torch.testing.assert_close(arriving(rule, bias), torch.tensor([want], dtype=torch.float64), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", SUMS)
def test_known_sums(name: str):
    rule, bias, want = SUMS[name]
    assert float(arriving(rule, bias).sum()) == pytest.approx(want, abs=5e-5)


def test_two_for_one_where_nothing_inhibits():
    """α2β1 of units without negative contributions hands on 2 R, unless told to redistribute."""
    layer, x = layer_of(W.abs(), None), X.abs()
    scale = R / layer(x)[0]
    for rule, total in ((AlphaBeta(), 6.0), (AlphaBeta(redistribute=True), 3.0)):
        assert float(relevance(layer, Rules((("layer", rule),)), x, scale).sum()) == pytest.approx(total)


# -- networks ---------------------------------------------------------------------------------------


def mlp(act: Callable[[], nn.Module] = nn.ReLU, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """A network 6-16-12-3."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise((6, 16, 12, 3))):
        weight = randn(b, a, seed=seed + i) / a**0.5
        layers += [layer_of(weight, 0.3 * randn(b, seed=seed + 10 + i) if bias else None), act()]
    return nn.Sequential(*layers[:-1])


def values(method: ap.Explainer, model: Callable[[Tensor], Tensor], x: Tensor, target: int | None = None) -> Tensor:
    found = method(ap.Field(model), x, target=target).values
    assert isinstance(found, Tensor)
    return found


EXACT = ap.LRP(ap.rules.epsilon(0.0))


def near(a: Tensor, b: Tensor, atol: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= atol)


BENCH: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...], tuple[float, ...]]] = {
    "B1 x1 + sqrt(x2)": (ap.planted.RootSum(), (4, 4), (4, 2)),
    "B3 max as a network": (ap.planted.Max(), (3, 1), (3, 0)),
    "B3 max": (lambda x: torch.maximum(x[:, 0], x[:, 1]), (3, 1), (3, 0)),
    "B3' max as a network": (ap.planted.Max(), (2, 2.001), (0, 2.001)),
    "B3' max": (lambda x: x.amax(1), (2, 2.001), (0, 2.001)),
    "B4 saturated": (ap.planted.Saturated(), (2, 0), (0, 0)),
    "B6 linear": (ap.planted.Linear([1.0, -2.0, 3.0], 0.5), (1, 2, 3), (1, -4, 9)),
    "B7 min as a network": (ap.planted.Min(), (2, 1), (0, 1)),
}


@pytest.mark.parametrize("name", BENCH)
def test_bench(name: str):
    model, at, want = BENCH[name]
    got = values(EXACT, model, torch.tensor([at], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64), atol=1e-12, rtol=0)


def test_b2_products_are_refused_until_they_have_a_rule():
    """relu(x1 - 1) relu(x2) at (2, 3): the derivative of the product gives (6, 3) and doubles the relevance."""
    x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    with pytest.raises(ap.ApportionError, match="mul"):
        values(EXACT, ap.planted.ReluProduct(), x)
    doubled = Rules((("product", Plain()), *ap.rules.epsilon(0.0).table))
    assert values(ap.LRP(doubled), ap.planted.ReluProduct(), x).tolist() == [[6.0, 3.0]]


def test_b8_b9_b12_piecewise_linear_networks_get_gradient_times_input():
    x = randn(4, 6, seed=3)
    for act in (nn.ReLU, lambda: nn.LeakyReLU(0.1)):
        for bias in (False, True):
            net = mlp(act, bias)
            got, plain = values(EXACT, net, x, 1), values(ap.GradientTimesInput(), net, x, 1)
            assert near(got, plain)
            absorbed = EXACT(ap.Field(net), x, target=1).parts["absorbed"]
            assert isinstance(absorbed, Tensor)
            assert near(absorbed, net(x)[:, 1] - got.sum(1))
            assert near(absorbed, torch.zeros(4)) is not bias
    # without biases the gradient is the same all the way from 0, and so is integrated gradients
    net = mlp(bias=False)
    ig = values(ap.IntegratedGradients(), net, x, 1)
    assert near(values(EXACT, net, x, 1), ig, 1e-10)
    assert not near(values(EXACT, mlp(), x, 1), values(ap.IntegratedGradients(), mlp(), x, 1), 1e-3)


def test_b10_b11_smooth_networks():
    x = randn(4, 6, seed=3)
    net = mlp(nn.Tanh, bias=False)
    a = EXACT(ap.Field(net), x, target=1)
    assert near(a.values.sum(1), net(x)[:, 1])
    assert not near(a.values, values(ap.GradientTimesInput(), net, x, 1), 1e-3)
    assert not a.warnings
    q = ap.Field(net).bind(x, target=1)
    rescaled = q.backward(x, torch.arange(4), ap.rules.deep_lift_rescale(), torch.zeros_like(x)).relevance
    assert near(a.values, rescaled)
    # where σ(0) is not 0 relevance sums to f(x), DeepLIFT's to f(x) - f(0), and the result says so
    net = mlp(nn.Sigmoid, bias=False)
    a = EXACT(ap.Field(net), x, target=1)
    assert near(a.values.sum(1), net(x)[:, 1])
    q = ap.Field(net).bind(x, target=1)
    rescaled = q.backward(x, torch.arange(4), ap.rules.deep_lift_rescale(), torch.zeros_like(x)).relevance
    assert isinstance(rescaled, Tensor)
    assert near(rescaled.sum(1), (net(x) - net(torch.zeros_like(x)))[:, 1])
    assert not near(rescaled, a.values, 1e-2)
    assert any("sigmoid(0) is 0.5" in w for w in a.warnings)
    assert any("softplus(0)" in w for w in EXACT(ap.Field(mlp(nn.Softplus)), x, target=0).warnings)


class Pictures(nn.Module):
    """Convolutions, pooling of both kinds, a residual addition, a concatenation, dense layers; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.body = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.side = nn.Conv2d(4, 2, 1, bias=False)
        self.dense = nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.stem(x).relu_(), 2)
        h = h + self.body(h).clamp(min=0)
        h = torch.cat([h, F.relu(self.side(h))], 1)
        return self.head(self.dense(F.adaptive_avg_pool2d(h, 1).flatten(1)).relu())


def pictures() -> tuple[Pictures, Tensor]:
    net = Pictures().double().requires_grad_(False)
    for i, p in enumerate(net.parameters()):
        p.copy_(randn(*p.shape, seed=20 + i) / p[0].numel() ** 0.5)
    return net, torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


COMPOSITES = {
    "epsilon": ap.rules.epsilon(0.0),
    "epsilon-plus": ap.rules.epsilon_plus(0.0),
    "epsilon-plus-flat": ap.rules.epsilon_plus_flat(0.0),
    "epsilon-gamma-box": ap.rules.epsilon_gamma_box(0.0, 1.0, epsilon=0.0),
    "z+ everywhere": ap.rules.alpha_beta(1.0, 0.0),
}


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("from_one", [False, True])
def test_relevance_is_conserved_without_biases(name: str, from_one: bool):
    net, x = pictures()
    a = ap.LRP(COMPOSITES[name], from_one)(ap.Field(net), x, target=2)
    assert isinstance(a.values, Tensor)
    total = torch.ones(3) if from_one else a.value
    torch.testing.assert_close(a.values.flatten(1).sum(1), total.double(), atol=1e-9, rtol=1e-9)
    assert near(torch.as_tensor(a.parts["absorbed"]), torch.zeros(3), 1e-9)


def test_alpha2_beta1_conserves_when_told_to_redistribute():
    net, x = pictures()
    net.stem.weight.abs_()  # units that nothing inhibits
    for redistribute in (False, True):
        rule = AlphaBeta(redistribute=redistribute)
        pairs = tuple((n, rule if n == "layer" else r) for n, r in ap.rules.alpha_beta().table)
        lost = torch.as_tensor(ap.LRP(Rules(pairs))(ap.Field(net), x, target=2).parts["absorbed"])
        assert near(lost, torch.zeros(3), 1e-9) is redistribute


def test_cancelling_branches_need_epsilon():
    """x + F(x) near 0: shares of the addition blow up, and a rule for it bounds them."""

    def model(x: Tensor) -> Tensor:
        return (x - 0.999999 * x.relu()).sum(1).exp() - 1  # a unit that looks at what is left

    x = torch.tensor([[3.0, 2.0]], dtype=torch.float64)

    def largest(rules: Rules) -> float:
        q = ap.Field(model).bind(x)
        tape = q.backward(x, torch.zeros(1, dtype=torch.long), rules, record=True, start="one").tape[0]
        sent = [(i, s) for r in tape if r.kind == "sub" for i, s in zip(r.inputs, r.sent, strict=True)]
        return max(float((i * s).abs().max()) for i, s in sent)

    pairs = ap.rules.epsilon().table
    assert largest(Rules(pairs)) > 1e5
    assert largest(Rules((("sub", Epsilon(0.1)), *pairs))) < 1e3


# -- units, boxes, refusals -------------------------------------------------------------------------


def test_relevance_behind_a_declared_normalization():
    layer = layer_of(torch.ones(1, 2, dtype=torch.float64), None)
    x = torch.tensor([[0.25, 1.0]], dtype=torch.float64)  # z = (-1, 2)
    field = ap.Field(layer, normalize=ap.Normalize((0.5,), (0.25,)))
    a = EXACT(field, x)
    assert a.values.tolist() == [[-1.0, 2.0]]
    assert any("the network's own input" in w for w in a.warnings)
    assert not EXACT(ap.Field(layer), x).warnings
    low, high = (0 - 0.5) / 0.25, (1 - 0.5) / 0.25
    boxed = ap.LRP(ap.rules.epsilon_plus_box(low, high))(field, x)
    torch.testing.assert_close(boxed.values, torch.tensor([[0.2, 0.8]], dtype=torch.float64))
    assert not any("box" in w for w in boxed.warnings)
    wrong = ap.LRP(ap.rules.epsilon_plus_box(0.0, 1.0))(field, x)  # in image units by mistake
    assert any("leaves the box" in w for w in wrong.warnings)


def test_simple_gamma_says_that_inputs_were_negative():
    layer = layer_of(W, None)
    rules = Rules((("layer", Gamma()),))
    assert any("GeneralizedGamma" in w for w in ap.LRP(rules)(ap.Field(layer), X, target=0).warnings)
    assert not ap.LRP(rules)(ap.Field(layer), X.abs(), target=0).warnings
    assert near(
        values(ap.LRP(rules), layer, X.abs(), 1),
        values(ap.LRP(Rules((("layer", GeneralizedGamma()),))), layer, X.abs(), 1),
    )


def test_a_rule_for_the_first_layer_needs_one():
    """Otherwise gradients would pass for relevance, or be added to it."""
    layer, x = layer_of(W, None), X
    method = ap.LRP(Rules((("layer", Epsilon()),), first=Flat()))
    assert values(method, lambda t: layer(t.reshape(-1, 3)), x, 0).shape == (1, 3)
    for model, names in {
        (lambda t: layer(2 * t)): "mul",
        (lambda t: layer(t)[:, :2] + t[:, :2]): "getitem",
        (lambda t: layer(torch.cat([t[:, 1:], t[:, :1]], 1))): "getitem",
    }.items():
        with pytest.raises(ap.ApportionError, match=names):
            method(ap.Field(model), x, target=0)


def test_a_unit_to_which_nothing_contributed_gives_nothing_and_no_nan():
    """Padding and dead channels: z = 0 exactly."""
    layer = nn.Conv2d(1, 2, 2, bias=False).double().requires_grad_(False)
    layer.weight[0] = 0
    layer.weight[1] = 1
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    x[0, 0, 0, 0] = 1
    plain = (Epsilon(), AlphaBeta(redistribute=True), ZPlus(), Gamma(), GeneralizedGamma())
    for rule in (*plain, WSquare(), Flat(), ZBox(-1.0, 1.0)):
        rules = Rules(first=rule) if rule.relevance else Rules((("layer", rule),))
        assert float(relevance(layer, rules, x, torch.ones(8, dtype=torch.float64)).sum()) == pytest.approx(1, abs=1e-5)


def test_rules_start_at_a_hidden_unit_too():
    net, x = mlp(), randn(3, 6, seed=3)
    unit = ap.Neuron(ap.At("2"), (5,))
    a = ap.LRP(ap.rules.epsilon(0.0))(ap.Field(net, score=unit), x)
    assert near(a.value, list(net)[2](net[1](net[0](x)))[:, 5])
    assert near(a.values, values(EXACT, nn.Sequential(*list(net)[:3]), x, 5))


def test_identity_is_the_limit_at_0():
    """σ(z)/z → σ'(0): a unit at 0 sends the signal on, as its neighbours do."""
    x = torch.tensor([[0.0, 1e-9, 2.0]], dtype=torch.float64)
    q = ap.Field(lambda t: t.tanh().sum(1)).bind(x)
    signal = q.backward(x, torch.zeros(1, dtype=torch.long), Rules((("elementwise", Identity()),))).signal
    assert isinstance(signal, Tensor)
    torch.testing.assert_close(signal, torch.tensor([[1.0, 1.0, math.tanh(2) / 2]], dtype=torch.float64))


def test_relevance_may_start_as_the_softmaxs_gradient():
    """R_t = p_t (1 - p_t) at the target's logit and -p_t p_c at the others, each sent down and summed."""
    net, x = mlp(), randn(3, 6, seed=3)
    rules = ap.rules.alpha_beta()
    a = ap.LRP(ap.rules.from_softmax_gradient(rules))(ap.Field(net, ap.Probability()), x, target=1)
    with torch.no_grad():
        p = net(x).softmax(1)
    start = p[:, 1:2] * (F.one_hot(torch.tensor(1), 3) - p)
    assert near(start.sum(1), torch.zeros(3))
    ones = torch.stack([values(ap.LRP(rules, from_one=True), net, x, c) for c in range(3)], 1)
    assert near(a.values, (start[:, :, None] * ones).sum(1))
    assert not near(a.values, p[:, 1:2] * ones[:, 1], 1e-2)
