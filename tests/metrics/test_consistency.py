"""Local accuracy, missingness, consistency and continuity: exact answers, wrong maps, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import Consistency, Continuity, LocalAccuracy, Missingness
from apportion.planted import Polynomial

F64 = torch.float64
X = torch.tensor([[2.0, 3.0, 5.0], [-1.0, 2.0, 0.5]], dtype=F64)
PRODUCT = Polynomial({(1, 1, 0): 1.0})


def close(a: Tensor, b: object) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=1e-6, atol=1e-9)


def test_local_accuracy_counts_from_the_fill() -> None:
    """With a marginal fill φ0 is the mean score of the rows, and Shapley values of that game explain from there."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 4.0]], dtype=F64)
    fill = ap.fills.Marginal(rows)
    field = ap.Field(Polynomial({(1, 1, 0): 1.0, (0, 0, 1): 1.0}))
    exact = LocalAccuracy(fill)(field, X, ap.Shapley(fill=fill))
    close(exact.values, 0.0)
    from_zero = LocalAccuracy(fill)(field, X, ap.Shapley())
    fx = X[:, 0] * X[:, 1] + X[:, 2]
    close(from_zero.parts["gap"], 2.0)  # the rows' mean score, (0 + 4) / 2
    close(from_zero.values, 2.0 / (fx - 2).abs())
    close(LocalAccuracy()(field, X, torch.zeros_like(X)).values, 1.0)


def test_one_channel_for_all_adds_up_to_itself_whatever_the_players() -> None:
    """Spread over single elements it would count once for each channel."""
    w = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 2, 2)
    field, x = ap.Field(lambda x: (x * w).sum((1, 2, 3))), torch.ones(2, 3, 2, 2, dtype=torch.float64)
    maps = (x * w).sum(1, keepdim=True)
    for groups in (None, ap.groups.Elements(), ap.groups.Pixels()):
        for metric in (LocalAccuracy(groups=groups), ap.metrics.EffectCompleteness(groups=groups)):
            assert bool((metric(field, x, maps).values < 1e-12).all())


def test_local_accuracy_of_products() -> None:
    close(LocalAccuracy()(ap.Field(PRODUCT), X, ap.IntegratedGradients()).values, 0.0)
    close(LocalAccuracy()(ap.Field(PRODUCT), X, ap.Occlusion()).values, 1.0)
    flat = LocalAccuracy()(ap.Field(lambda x: x[:, 0] - x[:, 1]), torch.ones(1, 2), torch.ones(1, 2))
    assert flat.undefined["the score changes by no more than rounding"].all()


def test_missing_features_get_nothing_from_methods_that_multiply_by_the_difference() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double().eval()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    judge, field = Missingness(), ap.Field(net)
    for method in (ap.GradientTimesInput(), ap.IntegratedGradients(), ap.Shapley(), ap.Occlusion(), ap.DeepLIFT()):
        close(judge(field, x, method, target=0).values, 0.0)
    assert (judge(field, x, ap.Gradient(), target=0).values > 0.1).all()
    given = ap.baselines.Given(torch.ones(1, 4, dtype=F64))
    moved = Missingness(ap.fills.Baselines(given))
    close(moved(field, x, ap.IntegratedGradients(given), target=0).values, 0.0)
    assert (moved(field, x, ap.IntegratedGradients(), target=0).values > 0.01).all()  # another absence
    mean = ap.baselines.Mean()  # of x, also where half of it is gone
    close(Missingness(ap.fills.Baselines(mean))(field, x, ap.IntegratedGradients(mean), target=0).values, 0.0)
    with pytest.raises(InputError, match="single player"):
        judge(ap.Field(lambda x: x[:, 0]), torch.ones(1, 1), ap.Gradient())
    nothing = judge(ap.Field(lambda x: 0 * x.sum(1)), x, ap.Gradient())
    assert nothing.undefined["maps of zeros"].all()


class Nested(nn.Module):
    """relu(a x1 + x2 - a): of (1, ½) both players are needed, whatever a in (½, 1] is."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a * x[:, 0] + x[:, 1] - self.a)


def test_deep_lift_gives_two_models_with_equal_contributions_unequal_values() -> None:
    """v = v': only both together make ½. Shapley values are (¼, ¼) for either; Rescale gives (⅓, ⅙) and (¼, ¼)."""
    field, x = ap.Field(Nested(1.0)), torch.tensor([[1.0, 0.5]], dtype=F64)
    judge = Consistency(other=Nested(0.5))
    close(ap.DeepLIFT()(field, x).values, [[1 / 3, 1 / 6]])
    close(judge(field, x, ap.Shapley()).values, 0.0)
    close(judge(field, x, ap.Occlusion()).values, 0.0)
    found = judge(field, x, ap.DeepLIFT())
    assert found.parts["players"].tolist() == [2]
    close(found.values, (1 / 12 + 1 / 12) / 1.0)


def test_consistency_of_an_added_term() -> None:
    """Each |x_i| / 3 more: complete methods rise by it; the gradient of the first falls where x_i is negative."""
    field = ap.Field(PRODUCT)
    for method in (ap.Shapley(), ap.IntegratedGradients(), ap.GradientTimesInput(), ap.Occlusion(), ap.DeepLIFT()):
        close(Consistency()(field, X, method).values, 0.0)
    found = Consistency()(field, X, ap.Gradient())
    close(found.values, [0.0, (1 / 3) / (2 + 1 + 0 + 5 / 3 + 2 / 3 + 1 / 3)])
    assert found.parts["players"].tolist() == [3, 3]


def test_players_that_rise_in_one_context_and_fall_in_another_are_not_compared() -> None:
    field, x = ap.Field(Polynomial({(1, 0): 1.0})), torch.ones(1, 2, dtype=F64)
    other = Polynomial({(1, 0): 2.0, (1, 1): -2.0})  # x1 adds 2 alone, 0 beside x2; x2 adds 0 or -2
    found = Consistency(other=other)(field, x, ap.Shapley())
    assert found.parts["players"].tolist() == [1]  # the second: nowhere more
    close(found.values, 0.0)
    with pytest.raises(ConfigError, match="other"):
        Consistency(other=3)
    with pytest.raises(ConfigError, match="External"):
        Consistency()(field, x, ap.External(lambda x, target: x))
    with pytest.raises(InputError, match=r"13 players.*\n.*at most 12\n.*groups"):
        Consistency()(ap.Field(lambda x: x.sum(1)), torch.ones(1, 13), ap.Gradient())


def test_continuity_is_the_largest_ratio_over_all_pairs() -> None:
    """A slow twin: translate by hand, explain one by one, and look at every pair."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)).double().eval()
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    field = ap.Field(net)
    for axis in (1, 2):
        found = Continuity(2, axis, pad=0.5)(field, x, ap.GradientTimesInput(), target=0)
        for b in range(2):
            points = []
            for by in range(-2, 3):
                z = torch.full((1, 4, 4), 0.5, dtype=F64)
                for at in range(4):
                    if 0 <= at - by < 4:
                        z.select(3 - axis, at).copy_(x[b].select(3 - axis, at - by))
                points.append(z)
            maps = [ap.GradientTimesInput()(field, z[None], target=0).values for z in points]
            ratios = [
                float((maps[i] - maps[j]).abs().sum() / (points[i] - points[j]).norm())
                for i in range(5)
                for j in range(i)
            ]
            close(found.values[b], max(ratios))


def test_continuity_of_steps_and_slopes() -> None:
    """The gradient of relu jumps where a linear map's does not; a small random move says the same of a table."""
    moves = Continuity(3, noise=ap.noise.Gaussian(0.1, relative=False))
    x = torch.full((1, 4), 1e-3, dtype=F64)
    close(moves(ap.Field(lambda z: 3 * z.sum(1)), x, ap.Gradient()).values, 0.0)
    assert float(moves(ap.Field(lambda z: z.relu().sum(1)), x, ap.Gradient()).values) > 1
    close(moves(ap.Field(lambda z: z.square().sum(1)), x[:, :1], ap.Gradient()).values, 2.0)
    still = Continuity()(ap.Field(lambda z: z.sum((1, 2, 3))), torch.zeros(1, 1, 4, 4), ap.Gradient())
    assert still.undefined["all positions look the same"].all()
    with pytest.raises(InputError, match="noise="):
        Continuity()(ap.Field(lambda z: z.sum(1)), x, ap.Gradient())
