"""LRP with zᴮ at the first layer, z⁺ in convolutions and ε in dense layers, against explicit matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.parts.rules import Epsilon, Rules, ZBox, ZPlus

EPSILON = 1e-6  # of the preset
LOW, HIGH = (-2.0, -1.5), (3.0, 2.5)


class Net(nn.Module):
    """Functional in-place ReLU, a ReLU module used twice, pooling."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(3, 4, 2, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.dense1 = nn.Linear(4, 5, bias=bias)
        self.dense2 = nn.Linear(5, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x), inplace=True)
        h = self.relu(self.conv2(F.max_pool2d(h, 2)))
        return self.dense2(self.relu(self.dense1(h.flatten(1))))


def net(bias: bool = True) -> Net:
    model = Net(bias).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(3)  # so that relevance is not tiny
    return model


def inputs() -> Tensor:
    return torch.rand(3, 2, 4, 4, dtype=torch.float64) * 4 - 1.5


def matrix(layer: nn.Module, like: Tensor) -> Tensor:
    """Write a layer without its bias as an explicit matrix [in, out], one unit vector at a time."""
    rows = []
    for i in range(like.numel()):
        unit = torch.zeros(like.numel(), dtype=like.dtype)
        unit[i] = 1
        at = unit.reshape(1, *like.shape)
        rows.append((layer(at) - layer(torch.zeros_like(at))).flatten())
    return torch.stack(rows)


def slow_lrp(model: Net, x: Tensor, target: int) -> Tensor:
    """Relevance of one example [C, H, W], layer by layer, from Σ_j contribution_ij R_j / Σ_i contribution_ij."""
    a1 = model.conv1(x[None]).relu()
    p1, at = F.max_pool2d(a1, 2, return_indices=True)
    a2 = model.conv2(p1).relu()
    a3 = model.dense1(a2.flatten(1)).relu()
    out = model.dense2(a3)[0]

    def dense(a: Tensor, layer: nn.Linear, relevance: Tensor) -> Tensor:
        z = layer(a)
        share = relevance / (z + EPSILON * torch.where(z < 0, -1.0, 1.0))
        return (a[:, None] * layer.weight.T * share).sum(1)

    relevance = torch.zeros_like(out)
    relevance[target] = out[target]
    relevance = dense(a3[0], model.dense2, relevance)
    relevance = dense(a2.flatten(), model.dense1, relevance)
    c = (p1.flatten()[:, None] * matrix(model.conv2, p1[0])).clamp(min=0)
    relevance = torch.where(c > 0, c / c.sum(0).clamp(min=1e-300) * relevance, 0.0).sum(1)
    relevance = F.max_unpool2d(relevance.reshape(p1.shape), at, (2, 2)).flatten()
    w = matrix(model.conv1, x)
    low, high = (torch.tensor(b, dtype=x.dtype)[:, None, None].expand_as(x).reshape(-1, 1) for b in (LOW, HIGH))
    c = x.reshape(-1, 1) * w - low * w.clamp(min=0) - high * w.clamp(max=0)
    return (c / c.sum(0) * relevance).sum(1).reshape(x.shape)


def relevance(field: ap.Field, x: Tensor, rules: Rules, target: int = 1) -> Tensor:
    q = field.bind(x, target=target)
    return q.backward(x, torch.arange(len(x)), rules).relevance


def test_the_composite_equals_explicit_matrices():
    model, x = net(), inputs()
    with torch.no_grad():
        slow = torch.stack([slow_lrp(model, row, 1) for row in x])
    got = relevance(ap.Field(model), x, ap.rules.epsilon_plus_box(LOW, HIGH))
    torch.testing.assert_close(got, slow, atol=1e-12, rtol=1e-10)
    for size in (1, 2):
        again = relevance(ap.Field(model, batch_size=size), x, ap.rules.epsilon_plus_box(LOW, HIGH))
        torch.testing.assert_close(again, got, atol=1e-12, rtol=0)
    # a wrong bound, and ε where z⁺ belongs, are noticed
    wrong = Rules((("layer", Epsilon()), ("relu", ap.rules.Plain()), ("max_pool2d", ap.rules.Plain())), ZBox(LOW, HIGH))
    for other in (ap.rules.epsilon_plus_box((-2.0, -1.0), HIGH), wrong):
        assert (relevance(ap.Field(model), x, other) - slow).norm() > 0.01 * slow.norm()


def test_relevance_is_conserved_without_biases_only():
    x = inputs()
    gaps = {}
    for bias in (False, True):
        field = ap.Field(net(bias))
        q = field.bind(x, target=1)
        done = q.backward(x, torch.arange(3), ap.rules.epsilon_plus_box(LOW, HIGH))
        assert done.kind == "relevance"
        gaps[bias] = ((done.relevance.flatten(1).sum(1) - done.value) / done.value).abs()
    assert gaps[False].max() < 1e-4  # what ε = 1e-6 absorbs
    assert gaps[True].min() > 1e-3


W, B = torch.tensor([[1, -1, 0.5], [0.5, 2, 1]], dtype=torch.float64), torch.tensor([0.1, -0.3], dtype=torch.float64)
X, R = torch.tensor([[1.0, 2, -1]], dtype=torch.float64), torch.tensor([1.0, 2], dtype=torch.float64)
KNOWN = {
    "zB": (Rules(first=ZBox(-2.0, 3.0)), False, (0.9524, 1.7460, 0.3016)),
    "zB ignores the bias": (Rules(first=ZBox(-2.0, 3.0)), True, (0.9524, 1.7460, 0.3016)),
    "z+": (Rules((("layer", ZPlus()),)), False, (1.2222, 1.7778, 0.0)),
    "LRP-0": (Rules((("layer", Epsilon(0.0)),)), True, (-0.4018, 3.9286, -0.2679)),
    "epsilon": (Rules((("layer", Epsilon(1e-9)),)), True, (-0.4018, 3.9286, -0.2679)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_numbers(name: str):
    rules, bias, expected = KNOWN[name]
    layer = nn.Linear(3, 2, bias=bias).double().requires_grad_(False)
    layer.weight.copy_(W)
    if bias:
        layer.bias.copy_(B)
    scale = R / layer(X)  # so that relevance R arrives at the layer's outputs
    got = relevance(ap.Field(layer, score=lambda out, _: (out * scale).sum(1)), X, rules, target=0)
    want = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)
    assert got.sum() == pytest.approx(3.2589 if name in ("LRP-0", "epsilon") else 3.0, abs=5e-5)
    wrong = {"zB": ZBox(-2.0, 2.0), "zB ignores the bias": ZBox(-1.0, 3.0), "z+": Epsilon(), "LRP-0": ZPlus()}
    other = relevance(
        ap.Field(layer, score=lambda out, _: (out * scale).sum(1)), X, Rules(first=wrong.get(name, Epsilon(0.5))), 0
    )
    assert (other - want).abs().max() > 0.01


def test_relevance_stands_at_the_networks_own_input():
    """A dark pixel under a positive weight: relevance is negative there, and positive in image units."""
    layer = nn.Linear(2, 1, bias=False).double().requires_grad_(False)
    layer.weight.fill_(1.0)
    field = ap.Field(layer, normalize=ap.Normalize((0.5,), (0.25,)))
    x = torch.tensor([[0.25, 1.0]], dtype=torch.float64)  # z = (-1, 2)
    q, owner = field.bind(x), torch.zeros(1, dtype=torch.long)
    done = q.backward(x, owner, Rules((("layer", Epsilon(0.0)),)))
    assert done.relevance.tolist() == [[-1.0, 2.0]]
    assert (x * q.value_and_grad(x, owner)[1]).tolist() == [[1.0, 4.0]]
    # zᴮ measures from the box: the same whichever units it is given in, if they are those of z
    low, high = (0 - 0.5) / 0.25, (1 - 0.5) / 0.25
    boxed = q.backward(x, owner, ap.rules.epsilon_plus_box(low, high)).relevance
    torch.testing.assert_close(boxed, torch.tensor([[0.2, 0.8]], dtype=torch.float64))
    wrong = q.backward(x, owner, ap.rules.epsilon_plus_box(0.0, 1.0)).relevance  # image units by mistake
    assert (wrong - boxed).abs().max() > 0.1


def test_a_box_rule_behind_the_first_layer_is_refused():
    model, x = net(), inputs()
    rules = Rules((("conv", ZBox(-1.0, 1.0)), ("relu", ap.rules.Plain()), ("max_pool2d", ap.rules.Plain())))
    with pytest.raises(ap.ApportionError, match=r"conv2 \(Conv2d\)"):
        relevance(ap.Field(model), x, rules)


def test_weights_of_a_plain_callable_are_constants():
    """A closure over a module whose weights want gradients is explained as the module itself."""
    model, x = net().requires_grad_(), inputs()
    rules = ap.rules.epsilon_plus_box(LOW, HIGH)
    torch.testing.assert_close(relevance(ap.Field(model.forward), x, rules), relevance(ap.Field(model), x, rules))
    scaled = relevance(ap.Field(lambda t: model(t * model.conv1.weight.sum())), x, ap.rules.epsilon())
    assert scaled.abs().max() > 0  # an operation on weights alone needs no rule
