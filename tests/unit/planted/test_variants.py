"""Variants are the user's function, differ inside, and say what could not be changed and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import InputError, ModelError
from apportion.planted import variants
from apportion.planted.networks import _fill


class Residual(nn.Module):
    """Convolutions, batch-norms, a residual sum, one ReLU used throughout, a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.inner = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.head = nn.Conv2d(8, 6, 3, stride=2), nn.Linear(6, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = h + self.inner(self.body(h))
        h = F.max_pool2d(self.act(self.down(self.act(h))), 2)
        return self.head(h.mean([2, 3]))


class Gated(nn.Module):
    """An inverted bottleneck: depthwise, squeeze and excitation, SiLU, a linear bottleneck with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand, self.one = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.two = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = F.silu(self.two(self.deep(F.silu(self.one(self.expand(x))))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        h = x + self.project(gate * h)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


def flat() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 9, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5)),
    )


def ready(net: nn.Module) -> nn.Module:
    _fill(net, 0).float()
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(size, generator=generator) / 3)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return net


def pictures() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


MAKERS: list[Callable[[], nn.Module]] = [Residual, Gated, flat]
KINDS = {
    "permuted": variants.permuted,
    "rescaled": variants.rescaled,
    "folded": variants.folded,
    "shifted": lambda net, x: variants.shifted(net, x, 0.7),
    "shifted by a picture": lambda net, x: variants.shifted(net, x, x[0] - 0.2),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_function(make: Callable[[], nn.Module], kind: str) -> None:
    net, x = ready(make()), pictures()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    v = KINDS[kind](net, x)
    elsewhere = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted = net(elsewhere)
    error = (v.other(elsewhere + v.shift) - wanted).abs().amax(1) / wanted.abs().amax(1)
    assert error.max() < 1e-5
    assert v.difference < 1e-5
    assert v.changed
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    # in float64 what is left of the difference is rounding
    double = KINDS[kind](ready(make()).double(), x.double())
    assert double.difference < 1e-12


@pytest.mark.parametrize("make", MAKERS)
def test_integrated_gradients_cannot_tell_and_guided_backprop_can(make: Callable[[], nn.Module]) -> None:
    net, x = ready(make()).double(), pictures().double()
    v = variants.permuted(net, x)
    method = ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(4))
    a, b = (method(ap.Field(m), x, target=1).values for m in (v.model, v.other))
    assert torch.allclose(a, b, atol=1e-10)


def test_which_layers_change() -> None:
    net, x = ready(Residual()), pictures()
    v = variants.permuted(net, x)
    assert v.changed == ("stem", "body", "down")  # the skip ties the first two
    assert v.left == {"head": "its units are the model's outputs"}
    assert not torch.equal(v.other.get_parameter("stem.weight"), net.get_parameter("stem.weight"))
    s = variants.rescaled(net, x)
    assert s.changed == v.changed
    gated = ready(Gated())
    assert set(variants.permuted(gated, x).changed) == {"stem", "expand", "squeeze", "excite", "project"}
    g = variants.rescaled(gated, x)
    assert set(g.changed) == {"stem", "squeeze", "project"}
    assert g.left["expand"] in ("'silu' is not positively homogeneous", "'sigmoid' is not positively homogeneous")
    assert variants.folded(gated, x).changed == ("one", "two")
    f = variants.folded(ready(flat()), x)
    assert f.changed == ("7",)
    assert isinstance(f.other.get_submodule("7"), nn.Identity)


def test_factors_and_orders_are_seeded() -> None:
    net, x = ready(Residual()), pictures()
    before = torch.random.get_rng_state()
    for make in (variants.permuted, variants.rescaled):
        one, same, other = make(net, x, seed=1), make(net, x, seed=1), make(net, x, seed=2)
        weights = [v.other.get_parameter("down.weight") for v in (one, same, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), before)
    # powers of two change no rounding
    assert variants.rescaled(ready(flat()), x).difference < 2e-7


def test_shift_goes_into_the_bias_where_it_can() -> None:
    net, x = ready(flat()), pictures()
    v = variants.shifted(net, x, torch.tensor([0.1, -0.2, 0.3]).reshape(3, 1, 1))
    assert isinstance(v.other.get_submodule("0"), nn.Conv2d)
    padded = variants.shifted(ready(Residual()), x, 0.5)
    assert isinstance(padded.other.get_submodule("stem"), nn.Sequential)
    table = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    assert variants.shifted(table, rows, 2.0).changed == ("0",)
    assert variants.shifted(nn.Sequential(nn.BatchNorm1d(4, affine=False)).eval(), rows, 2.0).difference < 1e-5


class Moving(nn.Module):
    """Turns its input about before the first layer reads it: by its shape, by indices, by axes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(36, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 1:].permute(0, 2, 3, 1).contiguous().view(x.size(0), x.shape[2] * x.shape[3], 1)
        h = torch.tanh(self.one(torch.squeeze(rows, -1))).reshape(x.size(0), -1)
        return self.two(h)


def test_shift_goes_through_what_moves_numbers() -> None:
    x = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    layers = (nn.Flatten(), nn.Identity(), nn.Dropout(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3))
    mlp = ready(nn.Sequential(*layers))
    for net, name in ((mlp, "3"), (ready(Moving()), "one")):
        for shift in (0.5, x[0] - 0.2):  # a number, and another one for every pixel
            v = variants.shifted(net, x, shift)
            assert v.changed == (name,)
            assert isinstance(v.other.get_submodule(name), nn.Linear)  # its bias alone
            assert v.difference < 1e-5
    with pytest.raises(ModelError, match="'1' \\(Softmax\\) reads") as error:
        variants.shifted(nn.Sequential(nn.Flatten(), nn.Softmax(1), nn.Linear(72, 3)).eval(), x, 0.5)
    assert "normalize" not in str(error.value)  # which nobody who asks for a shift may have
    for wrong in (nn.Flatten(), nn.Identity()):  # no layer at all
        with pytest.raises(ModelError, match="'output' reads"):
            variants.shifted(wrong, x, 0.5)


class Raw(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.softmax(self.two(torch.softmax(self.one((x - 0.5) / 0.2), 1)), 1))


def test_reasons_are_given() -> None:
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=r"'one': 'softmax' may mix or move them; 'two'.*'three': its units are"):
        variants.permuted(Raw(), rows)
    with pytest.raises(ModelError, match="no units may be rescaled"):
        variants.rescaled(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), rows)
    with pytest.raises(ModelError, match="'sub' reads the input"):
        variants.shifted(Raw(), rows, 1.0)
    with pytest.raises(ModelError, match=r"'1': it follows '0' \(ReLU\)"):
        variants.folded(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)).eval(), rows)
    with pytest.raises(ModelError, match="it has none"):
        variants.folded(Raw(), rows)
    with pytest.raises(InputError, match="broadcasts"):
        variants.shifted(nn.Linear(4, 2), rows, torch.ones(3))
    with pytest.raises(ModelError, match="no linear layer or convolution"):
        variants.permuted(nn.Sequential(nn.ReLU()), rows)


class Squares(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.kind = nn.Linear(4, 6), nn.Linear(6, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        made = {
            "square": lambda: h * h,
            "double": lambda: h + h,
            "over": lambda: 1 / (h.relu() + 1),
            "half": lambda: h / 2,
        }
        return self.two(made[self.kind]())


@pytest.mark.parametrize("kind", ["square", "double", "over", "half"])
def test_arithmetic(kind: str) -> None:
    net = ready(Squares(kind))
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    assert variants.permuted(net, rows).changed == ("one",)
    if kind == "half":
        assert variants.rescaled(net, rows).changed == ("one",)
    else:
        with pytest.raises(ModelError, match="positively homogeneous"):
            variants.rescaled(net, rows)


def test_shared_weights_and_layers_stay() -> None:
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    layer, like = nn.Linear(4, 4), nn.Linear(4, 4)
    like.weight = layer.weight
    tied = nn.Sequential(layer, nn.ReLU(), like, nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="share a weight"):
        variants.permuted(tied, rows)
    twice = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), layer, nn.Linear(4, 2))
    assert variants.permuted(twice, rows).difference < 1e-5  # one order for all three calls


def test_layers_whose_weights_are_made_elsewhere_stay() -> None:
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    made = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    v = variants.permuted(nn.Sequential(made, nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), rows)
    assert v.changed == ("2",)
    assert v.left["0"] == "it has a parametrization or hooks"


def test_a_change_that_shows_is_refused() -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).cumsum(-1)

    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="outputs that differ"):
        variants.permuted(nn.Sequential(Odd(4, 4), nn.ReLU(), nn.Linear(4, 2)), rows)
