"""Axioms, measured: methods that keep them, methods that do not, and maps that must be rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError, ModelError
from apportion.core.external import Unregistered
from apportion.metrics import (
    Completeness,
    Dummy,
    ImplementationInvariance,
    InputInvariance,
    Linearity,
    Sensitivity,
    Symmetry,
    WeakDependence,
)

INVARIANCES = [Linearity(), ImplementationInvariance(), InputInvariance(), Symmetry(pairs=2), WeakDependence()]


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double().eval()


def mlp(act: type[nn.Module] = nn.Tanh) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(nn.Linear(6, 12), act(), nn.Linear(12, 12), act(), nn.Linear(12, 3))


X = some(3, 6)


def test_completeness_is_a_relative_gap() -> None:
    """A comparison for equality fails an exact attribution nearly always; this is 0 to rounding."""
    field = ap.Field(mlp())
    exact = Completeness()(field, X, ap.Shapley())
    assert bool((exact.values < 1e-12).all())
    a = ap.IntegratedGradients()(field, X)
    assert a.gap is not None
    assert Completeness()(field, X, a).parts["gap"].tolist() == pytest.approx(a.gap.tolist(), abs=1e-12)
    assert Completeness()(field, X, torch.zeros(3, 6)).values.tolist() == [1, 1, 1]
    half = Completeness()(field, X, 1.5 * ap.Shapley()(field, X).values)
    assert half.values.tolist() == pytest.approx([0.5] * 3)
    warned = Completeness()(field, X, ap.Gradient())
    assert any("salience" in w for w in warned.warnings)
    own = Completeness(ap.baselines.Given(X))(field, X, torch.zeros(3, 6))
    assert own.undefined["the score changes by no more than rounding"].all()


@pytest.mark.parametrize("metric", [Completeness(), ap.metrics.LocalAccuracy(), ap.metrics.Infidelity()])
def test_no_wrong_map_is_exact_by_rounding(metric: ap.metrics.Metric) -> None:
    """Not zeros where the score hardly changes, nor what is wrong by 1e-4 or sums to 0 from large values."""
    x, infidelity = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), type(metric).__name__ == "Infidelity"
    coarse, zeros = ap.Field(lambda x: 1e6 + x.sum(1)), torch.zeros(4, 6)  # changes of 3, to a sixteenth
    found = metric(coarse, x, zeros)
    assert torch.equal(found.values, found.parts["of zeros"]) if infidelity else found.values.tolist() == [1] * 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(6, 2)
    net.bias.data = torch.tensor([12.0, 0.0])
    flat = metric(ap.Field(net, ap.Probability()), x, zeros, target=0)
    small = flat.undefined.get("the score changes by no more than rounding", torch.zeros(4, dtype=torch.bool))
    assert bool(small.any()) is not infidelity
    assert bool((flat.values[~small] > 0).all())
    plain = ap.Field(lambda x: x.sum(1))
    assert metric(plain, x, x).values.tolist() == [0] * 4
    assert bool((metric(plain, x, x * (1 + 1e-4)).values > 0).all())
    assert bool((metric(plain, x, 1e8 * torch.tensor([1.0, -1, 1, -1, 1, -1]).expand(4, 6)).values > 0.5).all())


def test_sensitivity_finds_the_saturated_unit() -> None:
    """f = 1 - relu(1 - x) at 2: the gradient is 0 where the score rose by 1 (Sundararajan et al.)."""
    field, x = ap.Field(lambda x: 1 - torch.relu(1 - x[:, 0]) + 0 * x[:, 1]), torch.tensor([[2.0, 5.0]])
    methods = (ap.Gradient(), ap.IntegratedGradients(), ap.Occlusion())
    found = {type(m).__name__: Sensitivity()(field, x, m) for m in methods}
    assert {k: s.values.item() for k, s in found.items()} == {"Gradient": 0, "IntegratedGradients": 1, "Occlusion": 1}
    assert found["Gradient"].parts["features"].tolist() == [1]  # the other one changes nothing
    grouped = Sensitivity()(field, x, ap.Occlusion(ap.groups.Labels(torch.tensor([0, 1]))))
    assert grouped.values.item() == 1  # values on groups are laid on their elements
    net = torch.nn.Linear(2, 1).double()
    halves = ap.Occlusion(ap.groups.Labels(torch.tensor([0, 1])))
    assert Symmetry(pairs=1)(ap.Field(net), x.double(), halves).values.item() < 1e-9
    flat = Sensitivity()(ap.Field(lambda x: 0 * x.sum(1) + 1), x, ap.Occlusion())
    assert flat.undefined["no feature changes the score alone"].all()


@pytest.mark.parametrize("metric", INVARIANCES, ids=lambda m: type(m).__name__)
def test_rounding_is_no_violation(metric: ap.metrics.Metric) -> None:
    """In float32 the gradient keeps every invariance but for rounding, by which methods must not be ranked."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 3)), torch.randn(6, 40)
    explainer = ap.IntegratedGradients() if isinstance(metric, Symmetry) else ap.Gradient()
    values = metric(ap.Field(net), x, explainer, ids=range(6)).values
    assert values.tolist() == [0.0] * 6


def test_maps_that_know_nothing_win_some_metrics_which_says_nothing() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), some(8, 4)
    for metric in (ImplementationInvariance(), InputInvariance(), ap.metrics.Consistency()):
        s = metric(ap.Field(net), x, ap.GradientTimesInput(), controls=[ap.controls.Random()], ids=range(8))
        assert s.controls["Random"].values.tolist() == [0] * 8
        assert s.beats("Random") is None
        assert "Random: 0" in repr(s)
    blind = Linearity()(ap.Field(net), x, ap.controls.Random())
    assert blind.values.tolist() == pytest.approx([2] * 8)


def test_sensitivity_counts_each_feature_once() -> None:
    field = ap.Field(lambda x: (x * torch.arange(6)).sum(1))
    blind = ap.External(lambda x, target: x * (torch.arange(6) != 3), "blind to one")
    assert Sensitivity(features=6)(field, X, blind).values.tolist() == pytest.approx([0.8] * 3)  # one of five
    assert Sensitivity(features=6)(field, X, ap.GradientTimesInput()).values.tolist() == [1, 1, 1]


def test_dummies_by_their_contexts() -> None:
    """x0 x1 + x2: no player alone tells that x0 matters, and x3 never does."""
    field = ap.Field(lambda x: x[:, 0] * x[:, 1] + x[:, 2] + 0 * x[:, 3])
    x = torch.ones(1, 4, dtype=torch.float64)
    found = Dummy(features=4)(field, x, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert found.parts["dummies"].tolist() == [1]
    assert found.values.tolist() == [0]
    assert Dummy(features=4)(field, x, torch.tensor([[0.0, 0.0, 0.0, 1.0]])).values.tolist() == [1]
    assert Dummy(features=4)(field, x, ap.controls.AllOnes()).values.tolist() == [1]
    none = Dummy()(ap.Field(lambda x: x.sum(1)), x, ap.Gradient())
    assert none.undefined["no feature drawn is a dummy"].all()


def test_equal_networks_get_equal_maps() -> None:
    """What differs from network to network is found out, by how much."""
    net = mlp(nn.ReLU)
    field = ap.Field(net)
    for method in (ap.Gradient(), ap.IntegratedGradients(), ap.GradientTimesInput()):
        found = ImplementationInvariance()(field, X, method)
        assert bool((found.values < 1e-10).all()), method
        assert set(found.parts) == {"permuted", "rescaled"}
    seen: list[float] = []

    def by_call(x: Tensor) -> Tensor:
        seen.append(1.0 + len(seen))
        return x * seen[-1]

    assert ImplementationInvariance()(field, X, Of(by_call)).values.tolist() == pytest.approx([2, 2, 2])
    with pytest.raises(ModelError, match="several inputs"):
        ImplementationInvariance()(ap.Field(_Two()), (X, X), ap.Gradient())
    with pytest.raises(ModelError, match=r"nn\.Module"):
        ImplementationInvariance()(ap.Field(lambda x: x.sum(1)), X, ap.Gradient())
    with pytest.raises(ConfigError, match="no other network"):
        ImplementationInvariance(permute=False, rescale=False, fold=False)


@dataclass(frozen=True, eq=False)
class Of(Unregistered):
    """A map made from the examples alone, whatever the model."""

    call: Any

    def explain(self, q: Any) -> ap.Attribution:
        return q.attribution(self, self.call(q.x))


def test_functions_that_know_one_model_are_not_asked_about_others() -> None:
    """A function of a user keeps explaining its own model, and would pass every comparison."""
    own = ap.External(lambda x, target: x)
    asked = (
        ImplementationInvariance(),
        InputInvariance(),
        Linearity(),
        Symmetry(),
        ap.metrics.ParameterRandomization(),
    )
    for metric in (*asked, ap.metrics.ParameterRandomization(), ap.metrics.EffectiveRandomization()):
        with pytest.raises(ConfigError, match="know one model"):
            metric(ap.Field(mlp(nn.ReLU)), X, own)


class _Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.sum(1) + b.sum(1)


def test_a_shift_of_the_input_moves_input_times_gradient_and_not_the_gradient() -> None:
    field = ap.Field(mlp(nn.ReLU))
    kept: dict[str, Any] = {
        "gradient": ap.Gradient(),
        "guided": ap.GuidedBackprop(),
        "own baseline": Of(lambda x: x - x.amin(1, keepdim=True)),
    }
    for name, method in kept.items():
        assert bool((InputInvariance(0.7)(field, X, method).values < 1e-9).all()), name
    for method in (ap.GradientTimesInput(), ap.IntegratedGradients()):
        assert bool((InputInvariance(0.7)(field, X, method).values > 1e-2).all()), method
    with pytest.raises(InputError, match="bounds or normalize"):
        InputInvariance()(ap.Field(mlp(nn.ReLU), bounds=(-9, 9)), X, ap.Gradient())


def test_a_shift_of_pictures_that_are_flattened_first() -> None:
    """As by every network of linear layers on digits."""
    x, field = X.reshape(3, 1, 2, 3), ap.Field(network(nn.Flatten(), nn.Dropout(), mlp(nn.ReLU)))
    for method in (ap.Gradient(), ap.GradientTimesInput()):
        found = InputInvariance(0.7)(field, x, method).values
        torch.testing.assert_close(found, InputInvariance(0.7)(ap.Field(mlp(nn.ReLU)), X, method).values)
    assert bool((InputInvariance()(field, x, ap.Gradient()).values < 1e-9).all())
    with pytest.raises(ModelError, match="give its results as data"):
        InputInvariance()(ap.Field(network(nn.Flatten(), nn.Tanh(), mlp())), x, ap.Gradient())


def test_sums_of_classes() -> None:
    field = ap.Field(mlp())
    for method in (ap.Gradient(), ap.IntegratedGradients(), ap.Occlusion()):
        assert bool((Linearity()(field, X, method).values < 1e-10).all()), method
    squares = Linearity()(field, X, ap.SmoothGradSquared(samples=4))
    assert bool((squares.values > 0.05).all())
    with pytest.raises(InputError, match="Linearity"):
        Linearity()(ap.Field(mlp(), ap.Probability()), X, ap.Gradient())
    with pytest.raises(InputError, match="Linearity"):
        Linearity()(ap.Field(_Sum()), X, ap.Gradient())


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_features_that_are_alike() -> None:
    field = ap.Field(mlp())
    for method in (ap.Gradient(), ap.IntegratedGradients(), ap.Shapley()):
        assert bool((Symmetry(pairs=3)(field, X, method).values < 1e-9).all()), method
    first = Of(lambda x: x * torch.arange(6))
    assert bool((Symmetry(pairs=3)(field, X, first).values > 0.05).all())
    zero = Symmetry()(field, X, Of(lambda x: 0 * x))
    assert zero.undefined["a map of zeros"].all()
    with pytest.raises(InputError, match="one element"):
        Symmetry()(ap.Field(nn.Linear(1, 2)), torch.ones(1, 1), ap.Gradient())
    alike = ap.Normalize((0.1, 0.5, 0.1, 0.9, 0.5, 0.5), (0.2, 1.0, 0.2, 3.0, 1.0, 2.0))  # 0 and 2, 1 and 4
    for method in (ap.Gradient(), ap.GradientTimesInput(), ap.IntegratedGradients()):
        assert bool((Symmetry(pairs=6)(ap.Field(mlp(), normalize=alike), X, method).values < 1e-9).all()), method
    with pytest.raises(InputError, match="each in its own way"):
        Symmetry()(ap.Field(mlp(), normalize=ap.Normalize((0.0,) * 6, tuple(range(1, 7)))), X, ap.Gradient())
