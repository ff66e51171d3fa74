"""Derivatives of attributions through rules, against central differences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.parts.rules import Epsilon, Guided, Plain, Rules


class Residual(nn.Module):
    """Convolutions, tanh, max-pool, a residual add in place, in-place ReLU, also on a view."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv1(x))
        r = self.conv2(h)
        r += h
        h = F.max_pool2d(F.relu(r, inplace=True), 2).flatten(1)
        h = self.fc1(h)
        h[:, 1:].relu_()
        return self.fc2(torch.tanh(h))


class ReLUs(nn.Sequential):
    def __init__(self):
        conv = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
        super().__init__(*conv, nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))


class Gated(nn.Module):
    """A product whose factors depend on one another, and on x directly."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.flatten(1)))
        g = self.b(h)
        g = F.relu(g) * h + h * h
        return self.c(g + x.flatten(1)[:, :6])


RULES = {
    "gradient": ap.rules.gradient(),
    "guided": Rules((("relu", Guided()),), otherwise=Plain()),
    "epsilon": Rules((("layer", Epsilon(0.3)),), otherwise=Plain()),
    "softplus": ap.rules.softplus(2.0),
}
X = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OWNER = torch.arange(2)
WEIGHTS = torch.linspace(-1, 2, 32, dtype=torch.float64).reshape(X.shape)


def question(net: nn.Module, **options: Any) -> ap.Question:
    for p in net.parameters():
        p.data.mul_(1.5)
    return ap.Field(net.double().eval(), **options).bind(X, target=1)


def functional(q: ap.Question, rules: Rules, rows: Tensor, owner: Tensor = OWNER, **options: Any) -> Tensor:
    """One number per row made of its attribution: the product with fixed weights of its example."""
    signal = q.backward(rows, owner, rules, **options).signal
    return (signal * WEIGHTS[owner]).flatten(1).sum(1)


def differences(q: ap.Question, rules: Rules, reference: Tensor | None = None, h: float = 1e-5) -> Tensor:
    """Central differences of `functional`; every shifted copy of an example is a row."""
    size = X[0].numel()
    owner = OWNER.repeat_interleave(size)
    step = h * torch.eye(size, dtype=X.dtype).repeat(2, 1).reshape(-1, *X.shape[1:])
    ride = {} if reference is None else {"reference": reference[owner]}
    up, down = (functional(q, rules, X[owner] + s * step, owner, **ride) for s in (1, -1))
    return ((up - down) / (2 * h)).reshape(X.shape)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("net", [Residual, Gated])
def test_against_finite_differences(net: type[nn.Module], rules: str):
    q = question(net())
    x = X.clone().requires_grad_()
    value = functional(q, RULES[rules], x, differentiable=True)
    torch.testing.assert_close(value.detach(), functional(q, RULES[rules], X), atol=1e-13, rtol=0)
    (found,) = torch.autograd.grad(value.sum(), x)
    expected = differences(q, RULES[rules])
    assert expected.norm() > 1e-3
    assert relative(found, expected) < 1e-6
    torch.testing.assert_close(x.detach(), X, atol=0, rtol=0)  # in-place steps never reach the rows


@pytest.mark.parametrize("rules", [ap.rules.guided_backprop(), ap.rules.epsilon(0.3), ap.rules.softplus(2.0)])
@pytest.mark.parametrize("size", [1, "auto"])
def test_presets_on_a_relu_net(rules: Rules, size: Any):
    q = question(ReLUs(), batch_size=size, normalize=ap.Normalize((0.1,), (0.5,)))
    x = X.clone().requires_grad_()
    value = functional(q, rules, x, differentiable=True)
    expected = differences(q, rules)
    (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if found is None or not found.any():  # guided backpropagation is piecewise constant here
        assert rules == ap.rules.guided_backprop()
        assert expected.abs().max() < 1e-8
    else:
        assert relative(found, expected) < 1e-6


def test_deep_lift_can_be_differentiated():
    q, reference = question(Gated()), torch.full_like(X, 0.1)
    x = X.clone().requires_grad_()
    rules = ap.rules.deep_lift_rescale()
    (found,) = torch.autograd.grad(functional(q, rules, x, reference=reference, differentiable=True).sum(), x)
    expected = differences(q, rules, reference)
    assert relative(found, expected) < 1e-6


class _Naive(torch.autograd.Function):
    """Guided backpropagation as it is usually written."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return signal.clamp(min=0) * (ctx.saved_tensors[0] > 0)


def test_a_plain_double_backward_through_a_rule_is_wrong():
    """Its second pass goes back through the rule where it should follow the true function."""
    w = torch.randn(16, 5, dtype=torch.float64) / 2
    v, u = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def net(x: Tensor, relu: Any = F.relu) -> Tensor:
        return torch.tanh(relu(x.flatten(1) @ w) @ v) @ u

    q = ap.Field(net).bind(X, target=1)
    rules, x = RULES["guided"], X.clone().requires_grad_()
    expected = differences(q, rules)
    (found,) = torch.autograd.grad(functional(q, rules, x, differentiable=True).sum(), x)
    assert relative(found, expected) < 1e-6
    (signal,) = torch.autograd.grad(net(x, _Naive.apply)[:, 1].sum(), x, create_graph=True)
    value = (signal * WEIGHTS).flatten(1).sum(1)
    torch.testing.assert_close(value.detach(), functional(q, rules, X))  # the map itself is right
    (naive,) = torch.autograd.grad(value.sum(), x)
    assert relative(naive, expected) > 0.1


def test_hessian_vector_products():
    q, owner = question(Residual()), torch.tensor([1, 0, 1])
    rows, vectors = X[owner] + 0.01, torch.randn(3, 1, 4, 4, dtype=torch.float64)
    value, grad, product = q.hvp(rows, owner, vectors)
    h = 1e-5
    up, down = (q.value_and_grad(rows + s * h * vectors, owner)[1] for s in (1, -1))
    assert relative(product, (up - down) / (2 * h)) < 1e-6
    assert relative(product, q.hvp(rows, owner, vectors.flip(0))[2]) > 0.1  # another direction would be noticed
    same = q.value_and_grad(rows, owner)
    torch.testing.assert_close((value, grad), same)
    assert question(ReLUs()).hvp(rows, owner, vectors)[2].abs().max() == 0
