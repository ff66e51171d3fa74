"""Guided backpropagation, Deconvnet and RectGrad against loops over layers, and what they hide."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap

SIZES = (6, 10, 8, 3)


def mlp(seed: int = 0, bias: bool = True) -> nn.Sequential:
    """A ReLU network 6-10-8-3 in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(SIZES):
            layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().requires_grad_(False)


def points(count: int = 4, features: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(net: nn.Sequential, x: Tensor, target: int, at_relu: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Send the one-hot target back through one example, layer by layer; `at_relu(z, R)` is the rule."""
    held = [x]
    for layer in net:
        held.append(layer(held[-1]))
    signal = F.one_hot(torch.tensor(target), len(held[-1])).double()
    for layer, z in zip(reversed(list(net)), reversed(held[:-1]), strict=True):
        signal = layer.weight.T @ signal if isinstance(layer, nn.Linear) else at_relu(z, signal)
    return signal


RULES: dict[ap.Explainer, Callable[[Tensor, Tensor], Tensor]] = {
    ap.GuidedBackprop(): lambda z, r: r.clamp(min=0) * (z > 0),
}


@pytest.mark.parametrize("method", RULES, ids=lambda m: type(m).__name__)
def test_the_rule_layer_by_layer(method: ap.Explainer):
    net, x = mlp(), points()
    want = torch.stack([slow(net, row, 1, RULES[method]) for row in x])
    got = method(ap.Field(net), x, target=1).values
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    gradient = torch.stack([slow(net, row, 1, lambda z, r: r * (z > 0)) for row in x])
    assert (got - gradient).abs().max() > 0.01


def test_guided_backprop_is_the_gradient_where_later_weights_are_not_negative():
    net, x = mlp(), points()
    for layer in list(net)[2:]:
        if isinstance(layer, nn.Linear):
            layer.weight.abs_()
    field = ap.Field(net)
    torch.testing.assert_close(
        ap.GuidedBackprop()(field, x, target=2).values, ap.Gradient()(field, x, target=2).values, atol=1e-14, rtol=0
    )


def test_values_are_per_unit_of_the_fields_own_input():
    """Behind a declared normalization a gradient is divided by std, like the plain one."""
    net, x = mlp(), points(3, 6)
    mean, std = (0.1, -0.2, 0.3, 0.0, 0.5, 0.2), (0.5, 2.0, 0.25, 1.0, 3.0, 0.1)
    first = nn.Linear(6, 6).double().requires_grad_(False)
    first.weight.copy_(torch.diag(1 / torch.tensor(std, dtype=torch.float64)))
    first.bias.copy_(-torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64))
    inside = nn.Sequential(first, net)
    declared = ap.GuidedBackprop()(ap.Field(net, normalize=ap.Normalize(mean, std)), x, target=0).values
    torch.testing.assert_close(declared, ap.GuidedBackprop()(ap.Field(inside), x, target=0).values)


def test_other_activations_are_refused_by_name():
    net = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)).double()
    with pytest.raises(ap.ApportionError, match="gelu"):
        ap.GuidedBackprop()(ap.Field(net), points(), target=0)


def test_equal_functions_get_different_maps():
    """relu(x) = x + relu(-x), but guided backpropagation drops what arrives at the second ReLU from below."""
    x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)

    def guided(f) -> list[float]:
        return ap.GuidedBackprop()(ap.Field(f), x).values[:, 0].tolist()

    assert guided(lambda t: -t[:, 0].relu()) == [0.0, 0.0]
    assert guided(lambda t: -t[:, 0] - (-t[:, 0]).relu()) == [-1.0, -1.0]


def test_a_map_of_zeros_is_recorded():
    a = ap.GuidedBackprop()(ap.Field(lambda x: x.relu().sum(1)), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    assert a.values.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert [w for w in a.warnings if "zero everywhere for example(s) 1" in w]
