"""Patterns, PatternNet and PatternAttribution against numbers by hand and against sums over explicit patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError, RuleError
from apportion.parts.rules import LinearPatterns, Patterns, PositivePatterns


def unit(bias: float = 0.0) -> nn.Linear:
    """y = x₁ - x₂."""
    layer = nn.Linear(2, 1).double().requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    layer.bias.fill_(bias)
    return layer


def toy(mean: float = 0.0, low: float = -1.0, high: float = 1.0) -> Tensor:
    """A signal s along (1, 0), a distractor d along (1, 1) of another spread and mean, in all combinations."""
    steps = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    s, d = torch.cartesian_prod(low + (high - low) * steps, mean + torch.tensor([-3.0, -1.0, 1.0, 3.0]).double()).T
    return torch.stack([s + d, d], 1)


def pattern(model: nn.Module, data: Tensor, estimator=None) -> list[float]:
    found = Patterns.fit(ap.Field(model), data, estimator or PositivePatterns())
    return found.layers["linear 0"][0].tolist()


@pytest.mark.parametrize("estimator", [LinearPatterns(), PositivePatterns(), PositivePatterns(printed=True)])
@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU()])
def test_the_toy_of_the_paper(estimator, behind: nn.Module) -> None:
    net = nn.Sequential(unit(), behind)
    data = toy()
    assert pattern(net, data, estimator) == pytest.approx([1.0, 0.0], abs=1e-12)
    patterns = Patterns.fit(ap.Field(net), data, estimator)
    x = torch.tensor([[5.0, 3.0]], dtype=torch.float64)
    field = ap.Field(net)
    assert ap.PatternNet(patterns)(field, x).values.tolist() == [pytest.approx([2.0, 0.0], abs=1e-12)]
    assert ap.PatternAttribution(patterns)(field, x).values.tolist() == [pytest.approx([2.0, 0.0], abs=1e-12)]
    assert ap.Gradient()(field, x).values.tolist() == [[1.0, -1.0]]


def test_the_printed_mean_leaks() -> None:
    """E[y] over all data, as printed, gives (7/3, 4/3) where inputs have mean 2; E₊[y] and covariances do not."""
    net, data = nn.Sequential(unit(), nn.ReLU()), toy(mean=2.0, low=-0.5, high=1.5)
    assert pattern(net, data, PositivePatterns(printed=True)) == pytest.approx([7 / 3, 4 / 3], abs=1e-4)
    assert pattern(net, data) == pytest.approx([1.0, 0.0], abs=1e-12)
    assert pattern(net, data, LinearPatterns()) == pytest.approx([1.0, 0.0], abs=1e-12)


def test_the_positive_regime_is_that_of_the_relu() -> None:
    """Where the signal's direction depends on its sign, only rows that pass the ReLU count, bias included."""
    s = torch.linspace(-1, 1, 41, dtype=torch.float64)
    x = torch.stack([torch.where(s > 0, s, 2 * s), torch.where(s > 0, 0.0, s)], 1)  # y = s either way
    net = nn.Sequential(unit(), nn.ReLU())
    assert pattern(net, x) == pytest.approx([1.0, 0.0], abs=1e-12)
    assert pattern(net, x, LinearPatterns())[1] > 0.2
    assert pattern(unit(), x)[1] == pytest.approx(pattern(net, x, LinearPatterns())[1])  # no ReLU: always on
    shifted = pattern(nn.Sequential(unit(0.5), nn.ReLU()), x)
    assert shifted[1] > 0.05  # some of the negative side passes


class Net(nn.Module):
    """Strided, padded, grouped convolutions, batch-norm, in-place ReLU, pooling, two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.dense1, self.dense2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv1(x)), inplace=True)
        h = F.max_pool2d(self.conv2(h).relu(), 3)
        return self.dense2(self.dense1(h.flatten(1)).clamp_min(0))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().double().eval().requires_grad_(False)
    for t in (model.norm.running_mean, model.norm.weight, model.norm.bias):
        assert t is not None
        t.normal_(mean=0.3, std=0.5)
    for layer in (model.conv1, model.conv2, model.dense1):
        layer.weight.mul_(3)
    model.dense1.bias.fill_(8.0)  # so that every unit passes sometimes
    return model


def data(count: int = 40) -> Tensor:
    return torch.randn(count, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) + 0.4


def by_patches(x: Tensor, conv: nn.Conv2d, on: Tensor) -> Tensor:
    """The positive estimator over explicit patches, one output channel at a time."""
    assert isinstance(conv.padding, tuple)
    patches = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)  # [n, in·k·k, places]
    patches = patches.transpose(1, 2).flatten(0, 1)
    on = on.flatten(2).transpose(1, 2).flatten(0, 1)
    wide = conv.weight[0].numel()
    out = []
    for j in range(conv.out_channels):
        group = j // (conv.out_channels // conv.groups)
        mine = patches[:, group * wide : (group + 1) * wide]
        y = mine @ conv.weight[j].flatten()
        some = on[:, j]
        mine, y = mine[some], y[some]
        a = (mine * y[:, None]).mean(0) - mine.mean(0) * y.mean()
        out.append(a / (a @ conv.weight[j].flatten()))
    return torch.stack(out).reshape(conv.weight.shape)


def by_rows(x: Tensor, layer: nn.Linear, on: Tensor) -> Tensor:
    y = x @ layer.weight.T
    out = []
    for j in range(layer.out_features):
        mine, mine_y = x[on[:, j]], y[on[:, j], j]
        a = (mine * mine_y[:, None]).mean(0) - mine.mean(0) * mine_y.mean()
        out.append(a / (a @ layer.weight[j]))
    return torch.stack(out)


def slow_patterns(model: Net, x: Tensor) -> dict[str, Tensor]:
    c1 = model.norm(model.conv1(x))
    h1 = c1.relu()
    c2 = model.conv2(h1)
    pooled, at = F.max_pool2d(c2.relu(), 3, return_indices=True)
    d1 = model.dense1(pooled.flatten(1))
    h2 = d1.relu()
    del at
    return {
        "conv 0": by_patches(x, model.conv1, c1 > 0),
        "conv 1": by_patches(h1, model.conv2, c2 > 0),
        "linear 0": by_rows(pooled.flatten(1), model.dense1, d1 > 0),
        "linear 1": by_rows(h2, model.dense2, torch.ones(len(x), 3, dtype=torch.bool)),
    }


def test_patterns_against_explicit_patches() -> None:
    model, x = net(), data()
    found, slow = Patterns.fit(ap.Field(model), x), slow_patterns(model, x)
    assert found.layers.keys() == slow.keys()
    assert (found.examples, found.silent) == (40, 0)
    for name, want in slow.items():
        torch.testing.assert_close(found.layers[name], want, atol=1e-9, rtol=1e-8)
    linear = Patterns.fit(ap.Field(model), x, LinearPatterns()).layers
    torch.testing.assert_close(linear["linear 1"], slow["linear 1"], atol=1e-9, rtol=1e-8)  # no ReLU behind it
    assert (linear["conv 0"] - slow["conv 0"]).norm() > 0.05 * slow["conv 0"].norm()


def test_data_may_come_in_batches() -> None:
    model, x = net(), data()
    whole = Patterns.fit(ap.Field(model), x)
    parts = Patterns.fit(ap.Field(model, batch_size=7), iter(x.split(16)))
    for name, a in whole.layers.items():
        torch.testing.assert_close(parts.layers[name], a, atol=1e-10, rtol=1e-9)
    assert parts.examples == 40
    with pytest.raises(InputError, match="no data"):
        Patterns.fit(ap.Field(model), iter(()))


def matrix(layer: nn.Module, weight: Tensor, like: Tensor) -> Tensor:
    """Write a layer with another weight and no bias as a matrix [in, out]."""
    rows = []
    for i in range(like.numel()):
        e = torch.zeros(like.numel(), dtype=like.dtype)
        e[i] = 1
        at = e.reshape(1, *like.shape)
        if isinstance(layer, nn.Conv2d):
            out = F.conv2d(at, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            out = F.linear(at, weight)
        rows.append(out.flatten())
    return torch.stack(rows)


def slow_map(model: Net, patterns: dict[str, Tensor], x: Tensor, target: int, weighted: bool) -> Tensor:
    """One example [C, H, W], layer by layer, in matrices."""

    def used(name: str, layer: nn.Module) -> Tensor:
        weight = layer.get_parameter("weight")
        return patterns[name] * weight if weighted else patterns[name]

    c1 = model.norm(model.conv1(x[None]))
    h1 = c1.relu()
    c2 = model.conv2(h1)
    pooled, at = F.max_pool2d(c2.relu(), 3, return_indices=True)
    d1 = model.dense1(pooled.flatten(1))
    out = model.dense2(d1.relu())[0]
    s = torch.zeros_like(out)
    s[target] = out[target]
    s = matrix(model.dense2, used("linear 1", model.dense2), d1[0]) @ s
    s = s * (d1[0] > 0)
    s = matrix(model.dense1, used("linear 0", model.dense1), pooled.flatten()) @ s
    s = F.max_unpool2d(s.reshape(pooled.shape), at, (3, 3), output_size=c2.shape) * (c2 > 0)
    s = matrix(model.conv2, used("conv 1", model.conv2), h1[0]) @ s.flatten()
    s = s.reshape(h1.shape) * (c1 > 0)
    if not weighted:  # the pattern of a single input with weight w is 1 / w
        variance = model.norm.running_var
        assert variance is not None
        s = s / (model.norm.weight / (variance + model.norm.eps).sqrt())[:, None, None]
    return (matrix(model.conv1, used("conv 0", model.conv1), x) @ s.flatten()).reshape(x.shape)


@pytest.mark.parametrize("weighted", [False, True])
def test_maps_against_matrices(weighted: bool) -> None:
    model, x = net(), data()
    patterns = Patterns.fit(ap.Field(model), x)
    explain = (ap.PatternAttribution if weighted else ap.PatternNet)(patterns)
    got = explain(ap.Field(model), x[:3], target=1).values
    want = torch.stack([slow_map(model, patterns.layers, row, 1, weighted) for row in x[:3]])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    other = torch.stack([slow_map(model, patterns.layers, row, 1, not weighted) for row in x[:3]])
    assert (got - other).norm() > 0.1 * got.norm()


def test_calls_of_a_reused_layer_have_patterns_of_their_own() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(3, 3).double()

    def model(x: Tensor) -> Tensor:
        return layer(layer(x).relu())

    found = Patterns.fit(ap.Field(model), torch.randn(50, 3, dtype=torch.float64)).layers
    assert sorted(found) == ["linear 0", "linear 1"]
    assert (found["linear 0"] - found["linear 1"]).abs().max() > 0.01
    assert ap.PatternNet(Patterns(found, PositivePatterns(), 50))(
        ap.Field(model), torch.ones(1, 3).double()
    ).values.any()


def test_saved_and_read_again(tmp_path: Path) -> None:
    model, x = net(), data()
    found = Patterns.fit(ap.Field(model), x, PositivePatterns(printed=True))
    found.save(tmp_path / "patterns.safetensors")
    again = Patterns.load(tmp_path / "patterns.safetensors")
    assert (again.estimator, again.examples) == (found.estimator, found.examples)
    assert all(torch.equal(again.layers[k], v) for k, v in found.layers.items())
    a, b = (ap.PatternNet(p)(ap.Field(model), x[:2]) for p in (found, again))
    assert torch.equal(a.values, b.values)
    assert a.method == b.method
    a.save(tmp_path / "map.safetensors")
    with pytest.raises(ConfigError, match=r"no record of ours(.|\n)*Patterns\.save"):
        Patterns.load(tmp_path / "map.safetensors")
    with pytest.raises(ConfigError, match=r"Attribution\.save"):
        ap.Attribution.load(tmp_path / "patterns.safetensors")
    with pytest.raises(ConfigError, match=r"Patterns\.save"):
        Patterns.load(tmp_path / "absent.safetensors")


def test_mistakes() -> None:
    model, x = net(), data()
    field = ap.Field(model)
    with pytest.raises(ConfigError, match=r"PatternNet without patterns(.|\n)*Patterns\.fit"):
        ap.PatternNet()(field, x[:1])
    patterns = Patterns.fit(field, x)
    with pytest.raises(RuleError, match=r"conv 0.*of which these patterns are not|linear 1.*of which"):
        ap.PatternNet(patterns)(ap.Field(net(seed=1)), x[:1])
    fewer = Patterns({k: v for k, v in patterns.layers.items() if k != "conv 1"}, patterns.estimator, 40)
    with pytest.raises(RuleError, match="conv 1"):
        ap.PatternAttribution(fewer)(field, x[:1])
    up = nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.ReLU(), nn.Flatten()).double()
    with pytest.raises(RuleError, match="conv_transpose"):
        Patterns.fit(ap.Field(up), x)
    with pytest.raises(RuleError, match="without linear layers"):
        Patterns.fit(ap.Field(lambda x: x.flatten(1) * 2), x)
    product = torch.randn(162, 3, dtype=torch.float64)
    with pytest.raises(RuleError, match="matmul"):
        ap.PatternNet(patterns)(ap.Field(lambda x: x.flatten(1) @ product), x[:1])


def test_units_that_never_pass_are_said() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double().requires_grad_(False)
    model.get_parameter("0.bias").copy_(torch.tensor([-100.0, 0.0, 0.0]))
    field, x = ap.Field(model), torch.randn(30, 2, dtype=torch.float64)
    patterns = Patterns.fit(field, x)
    assert patterns.silent == 1
    assert not patterns.layers["linear 0"][0].any()
    a = ap.PatternNet(patterns)(field, x[:2])
    assert "1 unit(s) never passed" in " ".join(a.warnings)
    assert a.values.isfinite().all()
